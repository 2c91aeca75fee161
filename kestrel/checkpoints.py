"""Checkpoints that are whole or ignored.

The Trainer takes the highest-numbered folder, crashes on a truncated one and goes on in silence where the optimizer,
the schedule or the random state is missing. Here a checkpoint counts only once it is sealed: a manifest, written last,
holds the hash of each file and what the run was.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kestrel.artifacts import MANIFEST, read_manifest, require_equal, write_manifest
from kestrel.errors import KestrelError

_KIND = "checkpoint"


def seal(checkpoint: Path, meaning: dict[str, Any]) -> None:
    """Declares a checkpoint complete.

    Args:
        checkpoint: its folder, fully written.
        meaning: what must be equal for a run to go on from here.
    """
    write_manifest(checkpoint, _KIND, meaning, made_from={})


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def sound(checkpoint: Path, meaning: dict[str, Any], anew: str) -> Path:
    """The checkpoint, if it is whole and belongs to this run.

    Args:
        checkpoint: its folder.
        meaning: of this run.
        anew: how to begin anew, for messages.

    Raises:
        KestrelError: incomplete, damaged, or of another run; naming each field that differs.
    """
    manifest = read_manifest(checkpoint, _KIND, "passed over")
    require_equal(f"the checkpoint {checkpoint}", manifest["settings"], meaning, f"begin anew with: {anew}")
    return checkpoint


def newest_sound(folder: Path, meaning: dict[str, Any], anew: str) -> tuple[Path | None, list[str]]:
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
            read_manifest(checkpoint, _KIND, "passed over")
        except KestrelError as error:
            damaged.append(str(error))
            continue
        return sound(checkpoint, meaning, anew), damaged
    return None, damaged


def remove_newer(folder: Path, step: int) -> None:
    """Deletes checkpoints after a step: unsound ones, which the run will write again."""
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint.name.rpartition("-")[2].isdecimal() and step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
