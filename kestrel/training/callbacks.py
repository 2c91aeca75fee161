"""Callbacks of the Trainer: proofs, schedule, log and early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from kestrel.errors import ProofError
from kestrel.runtime import distributed
from kestrel.runtime.atomic import write_atomically
from kestrel.training.progress import OnArrival

if TYPE_CHECKING:
    from kestrel.training.trainer import DialogueTrainer


class Guard(TrainerCallback):
    """Stops a run whose gradient is not finite or does not move the adapter.

    In float16 a gradient may exceed the type's range. The gradient scaler then skips the step and lowers the loss's scale;
    such steps are counted and shown.

    A norm is checked one step late, when the GPU has computed it, so that nothing waits for it. Before anything is logged,
    evaluated or saved, the last norm is checked too; so this must be the last of the callbacks.
    """

    def __init__(self, trainer: DialogueTrainer):
        self._trainer = trainer
        self._initial: dict[str, torch.Tensor] | None = None
        self._moved = False
        self._skipped = 0
        self._unchecked: tuple[int, OnArrival] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **extra: Any) -> None:
        if not self._moved:
            self._initial = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
        self._check()
        norm = self._trainer.last_gradient_norm
        assert norm is not None
        self._unchecked = state.global_step + 1, OnArrival(norm)

    def _check(self) -> None:
        """Refuses the last norm if it is not finite."""
        if self._unchecked is None:
            return
        (step, norm), self._unchecked = self._unchecked, None
        if not math.isfinite(norm.wait()):
            names = ", ".join(self._trainer.dialogues_of_step(step))
            raise ProofError(
                f"the gradient of step {step} is not finite; its dialogues are {names}. The checkpoints before it are "
                "kept: lower training.learning_rate, or check these dialogues, and run the same command again"
            )

    def _count_skipped(self, step: int) -> None:
        """Shows that the scaler skipped a step, and refuses a gradient that no scale makes finite."""
        self._skipped, self._unchecked = self._skipped + 1, None
        scale = self._trainer.accelerator.scaler.get_scale()
        if scale < 1:
            raise ProofError(
                f"the gradient of step {step} is not finite in float16, however small the loss is scaled; set "
                "quantization.compute_dtype to bfloat16 or float32, or check the step's dialogues: "
                + ", ".join(self._trainer.dialogues_of_step(step))
            )
        if distributed.is_first():
            tqdm.write(
                f"step {step:,} was skipped: its gradient exceeds float16's range; the loss is now scaled by {scale:,.0f} "
                f"(steps skipped: {self._skipped})"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **extra: Any) -> None:
        if self._trainer.accelerator.optimizer_step_was_skipped:
            self._count_skipped(state.global_step + 1)
            return
        if self._moved or self._trainer.lr_scheduler.get_last_lr()[0] == 0:
            return  # the learning rate is zero in the first step of a warm-up
        now = {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}
        assert self._initial is not None
        if all(torch.equal(self._initial[name], now[name]) for name in now):
            raise ProofError(
                "the first optimizer step moved no lora_B: its gradient is zero, and the adapter learns nothing"
            )
        self._moved, self._initial = True, None

    def on_step_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self._check()


class Schedule(TrainerCallback):
    """Logs, evaluates and saves where a resumed run will too, and finds the best checkpoint of a run that was moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        # The Trainer (5.23) takes the intervals from the checkpoint, also where this run's settings ask for others.
        state.logging_steps, state.eval_steps, state.save_steps = args.logging_steps, args.eval_steps, args.save_steps
        # The Trainer (5.17 to 5.23) forgets the best checkpoint where the recorded path no longer exists.
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if state.global_step == state.max_steps:  # the final weights are evaluated and saved too
            control.should_evaluate = control.should_save = True
        # A save ends the window that the logged loss is averaged over, so that a resumed run logs the same losses.
        control.should_log |= control.should_evaluate or control.should_save


class JsonLines(TrainerCallback):
    """Writes one line of logs/training.jsonl per logged step and per evaluation; for the first process.

    Args:
        tokens_until: int64 (steps,), tokens of dialogue seen after each optimizer step.
    """

    _KEYS = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_perplexity")

    def __init__(self, path: Path, tokens_until: np.ndarray):
        self._path, self._tokens_until = path, tokens_until

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        # The checkpoint holds, under its hashes, what was logged before it; the file may have been damaged since.
        with write_atomically(self._path) as file:
            file.writelines(self._lines(entry["step"], entry) for entry in state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **extra: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(self._lines(state.global_step, logs or {}))

    def _lines(self, step: int, logs: dict[str, float]) -> str:
        """One line, or none for an entry without any of the keys."""
        values = {key: logs[key] for key in self._KEYS if math.isfinite(logs.get(key, math.nan))}
        tokens = int(self._tokens_until[step - 1]) if step else 0
        return json.dumps({"step": step, **values, "tokens": tokens}) + "\n" if values else ""


def begin_of(history: Sequence[dict[str, Any]]) -> int:
    """The step at which the present part of a run began: 0, or where it had ended before it was extended."""
    return int(history[-1]["steps"]) if history else 0


def evaluations_without_progress(log_history: Sequence[dict[str, Any]], begin: int = 0) -> int:
    """Evaluations since the one with the lowest validation loss, in the Trainer's log_history, of those after `begin`."""
    losses = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry and entry.get("step", 0) > begin]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def had_stopped_early(
    log_history: Sequence[dict[str, Any]], patience: int | None, history: Sequence[dict[str, Any]]
) -> bool:
    """Whether no step is left, because that many evaluations made no progress; None or 0: training never stops early."""
    return bool(patience) and evaluations_without_progress(log_history, begin_of(history)) >= int(patience or 0)


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations without progress, counted in the log, which a resumed run has too, from `begin` on."""

    def __init__(self, patience: int, begin: int = 0):
        self._patience, self._begin = patience, begin

    def on_evaluate(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if evaluations_without_progress(state.log_history, self._begin) >= self._patience:
            control.should_training_stop = True
