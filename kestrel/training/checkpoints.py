"""Checkpoints that are complete or ignored.

The Trainer takes the highest-numbered folder, crashes on a truncated one, and continues silently where the optimizer, the
schedule or the random state is missing. Here a checkpoint counts only once it is complete: its manifest, written last,
holds the hash of each file and the fingerprint of the run.
"""

from __future__ import annotations

import shutil
import sys
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
_SKIPPED = "this checkpoint is skipped"
# Of training.*, what shapes the weights. A resumed run and a published adapter must agree in these; others may change.
DECISIVE_TRAINING_SETTINGS = {
    "batch_size", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer",
}  # fmt: skip


def resume_fingerprint(
    settings: Settings, dataset: str, base: dict[str, Any], prompt_sha256: str, steps: int
) -> dict[str, Any]:
    """All that decides the next step, and nothing else: a checkpoint is resumed only where it is the same.

    Args:
        dataset, base, prompt_sha256: identities.
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


def complete(checkpoint: Path, fingerprint: dict[str, Any], *growing: Path) -> None:
    """Writes the manifest of a checkpoint whose other files are written.

    Args:
        growing: files of the run, of which the checkpoint keeps a copy as they are now.
    """
    for path in growing:
        if path.exists():
            shutil.copyfile(path, checkpoint / path.name)
    write_manifest(checkpoint, _KIND, fingerprint, made_from={})


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def log_history(checkpoint: Path) -> list[dict[str, Any]]:
    """What the Trainer had logged by then: a dict for each logged step and each evaluation."""
    return list(_trainer_state(checkpoint)["log_history"])


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state, with the types of what is read from it checked."""
    state = read_json(checkpoint / _STATE, _SKIPPED)
    log = state.get("log_history") if isinstance(state, dict) else None
    if (
        not isinstance(log, list)
        or not all(isinstance(entry, dict) and isinstance(entry.get("eval_loss", 0), int | float) for entry in log)
        or not isinstance(state.get("best_global_step"), int | None)
    ):
        raise KestrelError(f"{checkpoint / _STATE} is damaged (no log of a training); {_SKIPPED}")
    return dict(state)


def require_resumable(checkpoint: Path, fingerprint: dict[str, Any], restart: str) -> Path:
    """The checkpoint, if it is complete and belongs to this run.

    Args:
        restart: the command that starts again from step 0, for messages.

    Raises:
        KestrelError: incomplete, damaged, or of another run; naming each field that differs.
    """
    recorded = _read_with_best(checkpoint)["settings"]
    require_equal(f"the checkpoint {checkpoint}", recorded, fingerprint, f"start again with: {restart}")
    return checkpoint


def _read_with_best(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, if it and the best one so far, which may win in the end, are undamaged."""
    manifest = read_complete(checkpoint, _SKIPPED)
    best = _trainer_state(checkpoint).get("best_global_step")
    if best and best != step_of(checkpoint):
        read_complete(checkpoint.with_name(f"checkpoint-{best}"), f"{checkpoint} needs it and is skipped")
    return manifest


def read_complete(checkpoint: Path, remedy: str) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as they were when it was completed.

    Raises:
        KestrelError: never completed, or damaged since; ending in `remedy`.
    """
    return read_manifest(checkpoint, _KIND, remedy)


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    return sorted(found, key=step_of, reverse=True)


def newest_resumable(folder: Path, fingerprint: dict[str, Any], restart: str) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a line for each newer one that is damaged.

    Args:
        folder: the run's checkpoints.
        restart: the command that starts again from step 0, for messages.

    Raises:
        KestrelError: the run in this folder was another one; naming each field that differs.
    """
    damaged = []
    for checkpoint in _numbered(folder):
        if not (checkpoint / MANIFEST).exists():
            damaged.append(f"{checkpoint} was never completed; {_SKIPPED}")
            continue
        try:
            _read_with_best(checkpoint)
        except KestrelError as error:
            damaged.append(str(error))
            continue
        return require_resumable(checkpoint, fingerprint, restart), damaged
    return None, damaged


def choose(resume: str, folder: Path, fingerprint: dict[str, Any], restart: str) -> Path | None:
    """The checkpoint to resume from, by training.resume; None to start at step 0. Deletes nothing.

    Raises:
        KestrelError: the named checkpoint is damaged or not of this run, or the folder holds another run's.
    """
    if resume == "never":
        return None
    checkpoint, damaged = newest_resumable(folder, fingerprint, restart)
    for line in damaged:
        print(f"warning: {line}", file=sys.stderr)
    if resume != "auto":
        if Path(resume).resolve().parent != folder.resolve() or not Path(resume).is_dir():
            names = ", ".join(sorted(path.name for path in folder.glob("checkpoint-*"))) or "no checkpoint"
            raise KestrelError(f"training.resume: {resume} is not a checkpoint of this run; {folder} holds {names}")
        checkpoint = require_resumable(Path(resume), fingerprint, restart)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    return checkpoint


def remove_newer(folder: Path, step: int) -> None:
    """Deletes the checkpoints after a step, which the run will write again."""
    for checkpoint in _numbered(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


@contextmanager
def refusing_pickles(restart: str) -> Iterator[None]:
    """Explains in plain words that torch refused to unpickle part of a checkpoint.

    The Trainer reads optimizer, schedule and random state with weights_only, which makes tensors and plain values and
    runs no code. Anything else does not come from Kestrel, whatever its manifest says.

    Args:
        restart: the command that starts again from step 0.
    """
    try:
        yield
    except UnpicklingError as error:
        raise KestrelError(
            f"the checkpoint holds more than tensors and plain values, and was not read ({str(error).splitlines()[0]}); "
            f"start again with: {restart}"
        ) from None
