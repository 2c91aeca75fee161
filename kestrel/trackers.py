"""What trackers are told of a run: its name and our settings, where transformers' Trainer would tell its own arguments.

The Trainer writes to the trackers of `training.report_to`; TensorBoard's files lie in RUN/logs, the others go where their
own environment variables say. None of them is a requirement but TensorBoard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import integration_utils

from kestrel.errors import KestrelError
from kestrel.settings import Settings, is_hub_id

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
        text = told[key]
        if text is not None and (Path(text).exists() or not is_hub_id(text)):
            told[key] = Path(text).name
    return told


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
