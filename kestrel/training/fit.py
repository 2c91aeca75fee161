"""The optimization from its first step, or from a checkpoint, to its end, and the adapter that comes out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kestrel.adapter.proof import save_and_prove
from kestrel.config.settings import Settings
from kestrel.errors import Interrupted
from kestrel.prompt.prompt import Prompt
from kestrel.runtime import distributed
from kestrel.runtime.disk_space import room_for, training_bytes
from kestrel.runtime.manifest import sha256_of
from kestrel.runtime.training_log import plot_loss
from kestrel.training import checkpoints, sharding
from kestrel.training.callbacks import StopOnSignal
from kestrel.training.model import peak_memory, trainable_parameters
from kestrel.training.trainer import DialogueTrainer


def fit(trainer: DialogueTrainer, stop: StopOnSignal, settings: Settings, resume: Path | None, restart: str) -> float:
    """Trains from a checkpoint, or from step 0, to the end. Returns the seconds it took.

    Args:
        resume: the checkpoint; newer ones are deleted. None deletes all and starts at step 0.
        restart: the command that starts again from step 0, for messages.

    Raises:
        Interrupted: a signal stopped it, after a checkpoint.
        KestrelError: no disk space or memory, or a checkpoint that cannot be read.
    """
    if trainer.args.device.type == "cuda":
        trainer.try_largest_pass()
    folder, steps, began = Path(trainer.args.output_dir), trainer.args.max_steps, time.monotonic()
    kept, vocabulary = max(2, settings.training.keep_checkpoints), len(trainer.processing_class)
    needed = training_bytes(trainable_parameters(trainer.model), vocabulary, steps, kept, folder)
    room = room_for("checkpoints, logs and adapter", needed, folder.parent)
    with room, stop.listening(), checkpoints.refusing_pickles(restart):
        # Only now, when nothing is left that could refuse the run, are other checkpoints deleted.
        if distributed.is_first():
            checkpoints.remove_newer(folder, checkpoints.step_of(resume) if resume else 0)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.received is not None and trainer.state.global_step < steps:
        raise Interrupted(
            stop.received, f"stopped at step {trainer.state.global_step}; the same command resumes from there"
        )
    return time.monotonic() - began


def save(
    trainer: DialogueTrainer,
    settings: Settings,
    prompt: Prompt,
    fingerprint: dict[str, Any],
    audit: dict[str, Any],
    seconds: float,
) -> None:
    """Writes the plot of the losses and the adapter; prints the best validation loss and what was proven.

    Args:
        fingerprint: what decided the training, for the manifest.
        audit: of the base, for the manifest.
        seconds: that training took, for the terminal.
    """
    run, state, model = Path(settings.run_dir), trainer.state, trainer.model
    log = run / "logs" / "training.jsonl"
    plot_loss(log, run / "logs" / "loss.png")
    facts = {
        "audit": audit,
        "trainable_parameters": trainable_parameters(model),
        "steps": state.global_step,
        "tokens": int(trainer.tokens_until[state.global_step - 1]),
        "best_step": state.best_global_step,
        "eval_loss": state.best_metric,
        "training_log": sha256_of(log),
    }
    if sharding.is_sharded(model):
        model = sharding.unsharded(model, settings)
    proof = save_and_prove(model, prompt, settings, run / "adapter", fingerprint, facts)
    print(
        f"best validation loss {state.best_metric:.4f} at step {state.best_global_step} of {state.global_step}; "
        f"{facts['tokens']:,} tokens, {seconds:.0f} s in this process{peak_memory()}"
    )
    print(f"proven: {proof}")
    print(f"wrote {run / 'adapter'}")
