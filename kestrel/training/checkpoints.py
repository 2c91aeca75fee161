"""Checkpoints that are complete or ignored.

The Trainer takes the highest-numbered folder, crashes on a truncated one, and continues silently where the optimizer, the
schedule or the random state is missing. Here a checkpoint counts only once it is complete: its manifest, written last,
holds the hash of each file and the fingerprint of the run.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kestrel.adapter.compute_dtype import with_compute_dtype
from kestrel.adapter.source import find_adapter
from kestrel.config.settings import DECISIVE_TRAINING_SETTINGS, Settings
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, read_manifest, require_equal
from kestrel.training.schedule import EXTENDABLE

KIND = "checkpoint"
_STATE = "trainer_state.json"
_SKIPPED = "this checkpoint is skipped"


def with_recorded_dtype(settings: Settings, planned: bool) -> Settings:
    """The settings with the compute type of the run's checkpoints, or of the adapter that it begins from, in place of auto.

    Args:
        planned: memory and time are estimated, for a card that need not be there.
    """
    training, run = settings.training, Path(settings.run_dir)

    def trained() -> Iterator[Path]:
        if training.resume != "never":
            yield from [] if training.resume == "auto" else [Path(training.resume)]
            yield from (*_newest_first(run / "checkpoints"), run / "adapter")
        if training.init_adapter is not None:
            with contextlib.suppress(KestrelError):  # which is reported when it is opened
                yield find_adapter(training.init_adapter)

    return with_compute_dtype(settings, trained(), planned and training.device_memory is not None)


def resume_fingerprint(
    settings: Settings, dataset: str, base: dict[str, Any], prompt_sha256: str, steps: int, initial: str | None = None
) -> dict[str, Any]:
    """All that decides the next step, and nothing else: a checkpoint is resumed only where it is the same.

    Args:
        steps: optimizer steps of the whole run, which shape the learning rate.
        initial: sha256 of the weights of training.init_adapter.
    """
    return {
        **({"init_adapter": initial} if initial else {}),
        "dataset": dataset,
        "base": base,
        "prompt_sha256": prompt_sha256,
        "quantization": settings.quantization.model_dump(),
        "lora": settings.lora.model_dump(),
        "training": {**settings.training.model_dump(include=DECISIVE_TRAINING_SETTINGS), "steps": steps},
        "seed": settings.seed,
    }


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


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    """The fingerprint in a checkpoint's manifest.

    Raises:
        KestrelError: it, or the best checkpoint so far, which may win in the end, is incomplete or damaged.
    """
    if not (checkpoint / MANIFEST).exists():
        raise KestrelError(f"{checkpoint} was never completed; {_SKIPPED}")
    manifest = read_manifest(checkpoint, KIND, _SKIPPED)
    best = _trainer_state(checkpoint).get("best_global_step")
    if best and best != step_of(checkpoint):
        read_manifest(checkpoint.with_name(f"checkpoint-{best}"), KIND, f"{checkpoint} needs it and is skipped")
    return dict(manifest["settings"])


def _newest_first(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    return sorted(found, key=step_of, reverse=True)


def choose(
    resume: str, folder: Path, fingerprint: dict[str, Any], restart: str
) -> tuple[Path | None, list[dict[str, Any]]]:
    """The checkpoint to resume from, by training.resume; None to start at step 0. Deletes nothing.

    Args:
        restart: the command that starts again from step 0, for messages.

    Returns:
        The checkpoint; and, where this run extends a finished one, what decided the training of each earlier stretch.

    Raises:
        KestrelError: the named checkpoint is damaged or not of this run, or the newest undamaged one is another run's;
            naming each field that differs.
    """
    if resume == "never":
        return None, []
    candidates = _newest_first(folder)
    if resume != "auto":
        if Path(resume).resolve().parent != folder.resolve() or not Path(resume).is_dir():
            names = ", ".join(sorted(path.name for path in folder.glob("checkpoint-*"))) or "no checkpoint"
            raise KestrelError(f"training.resume: {resume} is not a checkpoint of this run; {folder} holds {names}")
        candidates = [Path(resume)]
    for checkpoint in candidates:
        try:
            recorded = _settings_of(checkpoint)
        except KestrelError as error:
            if resume != "auto":
                raise
            print(f"warning: {error}", file=sys.stderr)
            continue
        history = list(recorded.pop("history", []))
        if is_extended(recorded, fingerprint, step_of(checkpoint)):
            history.append(recorded["training"])
            now = fingerprint["training"]
            print(
                f"extending the run that was finished at step {step_of(checkpoint):,} to {now['steps']:,} steps: the "
                f"learning rate of the added ones is {now['lr_schedule']}, from {now['learning_rate']:g}"
            )
        else:
            require_equal(f"the checkpoint {checkpoint}", recorded, fingerprint, f"start again with: {restart}")
            print(f"resuming from {checkpoint}")
        return checkpoint, history
    return None, []


def is_extended(recorded: dict[str, Any], fingerprint: dict[str, Any], step: int) -> bool:
    """Whether a run had finished at a checkpoint's step, and this one is the same with more steps."""
    before, now = recorded.get("training"), fingerprint.get("training")
    if not isinstance(before, dict) or now is None or not before.get("steps") == step < now["steps"]:
        return False
    return {**recorded, "training": before | {key: now[key] for key in EXTENDABLE}} == fingerprint


def remove_newer(folder: Path, step: int) -> None:
    """Deletes the checkpoints after a step, which the run will write again."""
    for checkpoint in _newest_first(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
