"""Checkpoints that are whole or ignored.

The Trainer takes the highest-numbered folder, crashes on a truncated one and goes on in silence where the optimizer,
the schedule or the random state is missing. Here a checkpoint counts only once it is complete: a manifest, written last,
holds the hash of each file and what the run was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, read_manifest, require_equal, write_manifest

_KIND = "checkpoint"
_STATE = "trainer_state.json"
# Of training.*, what shapes the weights. A resumed run and a published adapter must agree in these; others may change.
DECISIVE_TRAINING_SETTINGS = {
    "batch_size", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer",
}  # fmt: skip


def resume_fingerprint(
    settings: Settings, dataset: str, base: dict[str, Any], prompt_sha256: str, steps: int
) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed: everything that decides the next step, and nothing else.

    Args:
        settings: of the run.
        dataset: its identity.
        base: the base model's identity.
        prompt_sha256: the prompt's identity.
        steps: optimizer steps of the whole run, which shape the learning rate.
    """
    return {
        "dataset": dataset,
        "base": base,
        "prompt_sha256": prompt_sha256,
        "quantization": settings.quantization.model_dump(),
        "lora": settings.lora.model_dump(),
        "training": {**settings.training.model_dump(include=DECISIVE_TRAINING_SETTINGS), "steps": steps},
        "seed": settings.seed,
    }


def seal(checkpoint: Path, meaning: dict[str, Any], *beside: Path) -> None:
    """Declares a checkpoint complete.

    Args:
        checkpoint: its folder, fully written.
        meaning: what must be equal for a run to go on from here.
        beside: files that grow while the run does, of which the checkpoint keeps a copy as they are now.
    """
    for path in beside:
        if path.exists():
            shutil.copyfile(path, checkpoint / path.name)
    write_manifest(checkpoint, _KIND, meaning, made_from={})


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """What the Trainer had logged by then: a dict for each logged step and each evaluation."""
    return list(_state(checkpoint)["log_history"])


def _state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's account of a run, with what is read of it known to be of the right kind."""
    state = read_json(checkpoint / _STATE, "passed over")
    log = state.get("log_history") if isinstance(state, dict) else None
    if (
        not isinstance(log, list)
        or not all(isinstance(entry, dict) and isinstance(entry.get("eval_loss", 0), int | float) for entry in log)
        or not isinstance(state.get("best_global_step"), int | None)
    ):
        raise KestrelError(f"{checkpoint / _STATE} is damaged (no log of a training); passed over")
    return dict(state)


def require_resumable(checkpoint: Path, meaning: dict[str, Any], anew: str) -> Path:
    """The checkpoint, if it is whole and belongs to this run.

    Args:
        checkpoint: its folder.
        meaning: of this run.
        anew: how to begin anew, for messages.

    Raises:
        KestrelError: incomplete, damaged, or of another run; naming each field that differs.
    """
    manifest = _whole(checkpoint)
    require_equal(f"the checkpoint {checkpoint}", manifest["settings"], meaning, f"begin anew with: {anew}")
    return checkpoint


def _whole(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that can be gone on from: the best one, which may win in the end, is whole too."""
    manifest = read_sealed(checkpoint, "passed over")
    best = _state(checkpoint).get("best_global_step")
    if best and best != step_of(checkpoint):
        read_sealed(checkpoint.with_name(f"checkpoint-{best}"), f"{checkpoint} needs it and is passed over")
    return manifest


def read_sealed(checkpoint: Path, remedy: str) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as they were when it was written.

    Raises:
        KestrelError: never completed, or damaged since; ending in `remedy`.
    """
    return read_manifest(checkpoint, _KIND, remedy)


def newest_resumable(folder: Path, meaning: dict[str, Any], anew: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and one line for each newer one that is not.

    Args:
        folder: the run's checkpoints.
        meaning: of this run.
        anew: how to begin anew, for messages.

    Raises:
        KestrelError: the run in this folder was another one; naming each field that differs.
    """
    damaged = []
    found = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if not (checkpoint / MANIFEST).exists():
            damaged.append(f"{checkpoint} was never completed; passed over")
            continue
        try:
            _whole(checkpoint)
        except KestrelError as error:
            damaged.append(str(error))
            continue
        return require_resumable(checkpoint, meaning, anew), damaged
    return None, damaged


@contextmanager
def refusing_pickles(anew: str) -> Iterator[None]:
    """Says what it means that torch refused to unpickle part of a checkpoint.

    The Trainer reads optimizer, schedule and random state with weights_only, which makes tensors and plain values and
    runs nothing. Anything else is not from a run of ours, whatever its manifest says.

    Args:
        anew: how to begin anew.
    """
    try:
        yield
    except UnpicklingError as error:
        raise KestrelError(
            f"the checkpoint holds more than tensors and plain values, and was not read ({str(error).splitlines()[0]}); "
            f"begin anew with: {anew}"
        ) from None


def remove_newer(folder: Path, step: int) -> None:
    """Deletes checkpoints after a step: unsound ones, which the run will write again."""
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name.rpartition("-")[2].isdecimal() and step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
