"""What trackers are told of a run: its name and our settings, where transformers' Trainer would tell its own arguments.

The Trainer writes to the trackers of `training.report_to`; TensorBoard's files lie in RUN/logs, the others go where their
own environment variables say. None of them is a requirement but TensorBoard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils

from kestrel.config.settings import Settings, is_hub_id
from kestrel.errors import KestrelError

_PROJECT = "kestrel"
# Under which runs are filed where the user names nothing else; the Trainer's own default is "huggingface" or none.
_PROJECT_VARIABLES = (
    "CLEARML_PROJECT", "COMET_PROJECT_NAME", "MLFLOW_EXPERIMENT_NAME", "SWANLAB_PROJECT", "TRACKIO_PROJECT",
    "WANDB_PROJECT",
)  # fmt: skip
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
_SENT = ("seed", "data", "prompt", "model", "quantization", "lora", "training")  # what shapes the training
_MAY_BE_PATHS = ("data.source", "model.name", "model.adapter", "training.resume")


class TrackedArguments(TrainingArguments):
    """The Trainer's arguments. Trackers that ask for them as a dict get `told` instead.

    Most of what the Trainer would tell is at its defaults or misleading: its batch size, say, is 1, since its unit of
    data is the optimizer step.

    Attributes:
        told: what trackers get; given after the arguments have been made.
    """

    told: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.told)


def told_of(settings: Settings) -> dict[str, Any]:
    """The settings that shape the training, by dotted key. Of local paths the last part alone: they name machine and user."""
    told: dict[str, Any] = {}
    for name, value in settings.model_dump(include=set(_SENT)).items():
        told |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    for key in _MAY_BE_PATHS:
        told[key] = _last_part(told[key])
    return told


def _last_part(name: str | None) -> str | None:
    """A local path without what stands before its last part; an id on the Hub as it is."""
    return name if name is None or (is_hub_id(name) and not Path(name).exists()) else Path(name).name


def keep_paths_back(trainer: Trainer) -> None:
    """Lets the trackers see the base's name as `told_of` tells it.

    They send the configurations of model and adapter along (transformers 5.23), where a local base is named by its
    path. Both name it in full again between two of a tracker's turns: peft looks there for the base's files.
    """
    trackers = tuple(integration_utils.INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, trackers):
            for event in (name for name in dir(callback) if name.startswith("on_")):
                setattr(callback, event, _discreet(getattr(callback, event)))


def _discreet(event: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, model: Any = None, **more: Any) -> Any:
        with _last_parts_alone(model):
            return event(*arguments, model=model, **more)

    return call


@contextmanager
def _last_parts_alone(model: Any) -> Iterator[None]:
    places = [(getattr(model, "config", None), "_name_or_path")]
    places += [(config, "base_model_name_or_path") for config in getattr(model, "peft_config", {}).values()]
    full = [(config, name, getattr(config, name, None)) for config, name in places]
    for config, name, path in full:
        if path is not None:
            setattr(config, name, _last_part(path))
    try:
        yield
    finally:
        for config, name, path in full:
            if path is not None:
                setattr(config, name, path)


def naming(settings: Settings) -> dict[str, Any]:
    """Arguments of the Trainer that name the run, and nothing that would put it on the Hub unasked.

    TensorBoard's folder and the trackers' projects are told by environment variables; those that are set stay.
    """
    run = Path(settings.run_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "logs")
    for variable in _PROJECT_VARIABLES:
        os.environ.setdefault(variable, _PROJECT)
    return {
        "run_name": run.resolve().name,
        "project": os.environ["TRACKIO_PROJECT"],
        "trackio_space_id": os.environ.get("TRACKIO_SPACE_ID"),
        "hub_private_repo": True,
    }


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that cannot be used.

    Raises:
        KestrelError: naming it and its package.
    """
    usable = set(integration_utils.get_available_reporting_integrations())
    if integration_utils.is_flytekit_available():  # which the list leaves out (transformers 5.23)
        usable.add("flyte")
    missing = [name for name in names if name not in usable]
    if missing:
        packages = " ".join(_PACKAGES.get(name, name) for name in missing)
        raise KestrelError(
            f"training.report_to: {', '.join(missing)} is not installed, or not set up as its documentation asks; "
            f"pip install {packages}, or leave it out"
        )
