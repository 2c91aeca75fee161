"""What trackers receive: the run's name and our settings, instead of the Trainer's own arguments.

The Trainer writes to the trackers of `training.report_to`: TensorBoard to RUN/logs, the others where their own environment
variables say. Only TensorBoard is a requirement.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils

from kestrel.config.settings import Settings, is_hub_id
from kestrel.errors import KestrelError

# Where trackers read the project's name; the Trainer's own default is "huggingface" or none.
_PROJECT_VARIABLES = (
    "CLEARML_PROJECT", "COMET_PROJECT_NAME", "MLFLOW_EXPERIMENT_NAME", "SWANLAB_PROJECT", "TRACKIO_PROJECT",
    "WANDB_PROJECT",
)  # fmt: skip
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
_SECTIONS = {"seed", "data", "prompt", "model", "quantization", "lora", "training"}  # what shapes the training
_MAY_BE_PATHS = (
    "data.source", "data.dataset", "prompt.chat_template", "model.name", "model.adapter", "training.init_adapter",
    "training.resume",
)  # fmt: skip


class TrackedArguments(TrainingArguments):
    """The Trainer's arguments; trackers that read them as a dict get our settings: its own are defaults or misleading."""

    tracked: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.tracked)


def tracked_settings(settings: Settings) -> dict[str, Any]:
    """The settings that shape the training, by dotted key. Local paths, which name machine and user, lose their folders."""
    tracked: dict[str, Any] = {}
    for name, value in settings.model_dump(include=_SECTIONS).items():
        tracked |= {f"{name}.{key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    sentences = tracked["data.persona"]
    return tracked | {
        **{key: _last_part(tracked[key]) for key in _MAY_BE_PATHS},
        "data.persona": [Path(text).name if os.path.isfile(text) else text for text in sentences],
    }


def _last_part(name: str | None) -> str | None:
    """The last part of a local path; an id on the Hub as it is."""
    return name if name is None or (is_hub_id(name.partition("@")[0]) and not Path(name).exists()) else Path(name).name


def hide_paths(trainer: Trainer) -> None:
    """Keeps the local path of the base from the trackers.

    At the start of a training they send the configurations of model and adapter (transformers 5.23), which hold it.
    """
    begin, model = trainer.callback_handler.on_train_begin, trainer.model
    config = model.peft_config["default"]
    model.config._name_or_path = _last_part(model.config._name_or_path)

    def begin_without_path(*arguments: Any) -> Any:
        path, config.base_model_name_or_path = (
            config.base_model_name_or_path,
            _last_part(config.base_model_name_or_path),
        )
        control = begin(*arguments)
        config.base_model_name_or_path = path  # by which peft finds the base of the saved adapter
        return control

    trainer.callback_handler.on_train_begin = begin_without_path


def text_writer(trainer: Trainer) -> Callable[[str, str, int], None]:
    """Writes a text in Markdown to TensorBoard, under a name and at a step, where the run reports to it."""

    def write(name: str, text: str, step: int) -> None:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, integration_utils.TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(name, text, step)

    return write


def run_name_arguments(settings: Settings) -> dict[str, Any]:
    """The Trainer's arguments that name the run, and none that would upload it unasked.

    TensorBoard's folder and the trackers' projects are environment variables; those that the user has set stay.
    """
    run = Path(settings.run_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "logs")
    for variable in _PROJECT_VARIABLES:
        os.environ.setdefault(variable, "kestrel")
    return {
        "run_name": run.resolve().name,
        "project": os.environ["TRACKIO_PROJECT"],
        "trackio_space_id": os.environ.get("TRACKIO_SPACE_ID"),
        "hub_private_repo": True,
    }


def check_trackers(names: Sequence[str]) -> None:
    """Raises a KestrelError that names each tracker that cannot be used, and its package."""
    usable = set(integration_utils.get_available_reporting_integrations())
    if integration_utils.is_flytekit_available():  # missing from the list (transformers 5.23)
        usable.add("flyte")
    if missing := [name for name in names if name not in usable]:
        packages = " ".join(_PACKAGES.get(name, name) for name in missing)
        raise KestrelError(
            f"training.report_to: {', '.join(missing)} is not installed, or not set up as its documentation asks; "
            f"pip install {packages}, or leave it out"
        )
