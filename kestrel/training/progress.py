"""What a run shows while it trains: a live line on a terminal, a line for each evaluation, and what Ctrl-C waits for."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from kestrel.model.kernels import cards
from kestrel.model.quantization import linear_layers
from kestrel.runtime import distributed
from kestrel.runtime.machine import memory_limit, memory_used
from kestrel.runtime.output import write_to_stderr
from kestrel.runtime.signals import exit_now

if TYPE_CHECKING:
    from kestrel.training.trainer import DialogueTrainer

_SMOOTHING = 0.9
_STEPS_TIMED = 20


class OnArrival:
    """A number that a GPU may still have to compute, and that nothing should wait for."""

    def __init__(self, number: torch.Tensor):
        self._copy = number.detach().to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if number.is_cuda else None
        if self._event is not None:
            self._event.record()

    def has_arrived(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.item()


class Progress(TrainerCallback):
    """A live line on a terminal, and a line for each evaluation everywhere; for the first process.

    Args:
        steps_per_epoch: optimizer steps that see each dialogue once.
    """

    def __init__(self, trainer: DialogueTrainer, steps_per_epoch: int):
        self._trainer, self._steps_per_epoch = trainer, steps_per_epoch
        self._marks: deque[tuple[float, int]] = deque(maxlen=_STEPS_TIMED)  # time and tokens, since the last evaluation
        self._pending: deque[tuple[OnArrival, OnArrival]] = deque()
        self._loss = self._norm = self._rate = math.nan
        self._evaluation_seconds, self._began = 0.0, time.monotonic()
        # The backward pass computes no gradient of frozen weights: 2 operations forward and 2 backward.
        weights = sum(inputs * outputs for inputs, outputs in linear_layers(trainer.model).values())
        self._operations_per_token, self._peak_rate = 4 * weights, cards.peak_rate()

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._loss = losses[-1] if losses else math.nan
        form = "{n_fmt}/{total_fmt} {bar:6} {desc}"
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=form, disable=None, leave=False)
        self._show(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        if not self._marks:
            self._marks.append((time.monotonic(), self._tokens(state.global_step)))

    def on_step_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._marks.append((time.monotonic(), self._tokens(state.global_step)))
        (start, before), (now, after) = self._marks[0], self._marks[-1]
        self._rate = (after - before) / (now - start)
        assert self._trainer.last_loss is not None and self._trainer.last_gradient_norm is not None
        self._pending.append((OnArrival(self._trainer.last_loss), OnArrival(self._trainer.last_gradient_norm)))
        while self._pending and self._pending[0][1].has_arrived():
            loss, norm = self._pending.popleft()
            self._norm, latest = norm.wait(), loss.wait()
            smoothed = _SMOOTHING * self._loss + (1 - _SMOOTHING) * latest
            self._loss = latest if math.isnan(self._loss) else smoothed
        self._bar.update(state.global_step - self._bar.n)
        self._show(state)
        if control.should_evaluate or control.should_save:
            self._marks.clear()
            self._began = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **extra: Any) -> None:
        self._evaluation_seconds = time.monotonic() - self._began
        at = f"step {state.global_step:,} of {state.max_steps:,}" if state.global_step else "before the first step"
        tqdm.write(
            f"{at}: validation loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f} per reply token"
        )
        sys.stdout.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._bar.close()

    def _tokens(self, step: int) -> int:
        return int(self._trainer.tokens_until[step - 1]) if step else 0

    def _show(self, state: Any) -> None:
        """The most important first: a narrow terminal cuts the line."""
        if self._bar.disable:
            return
        step = state.global_step
        parts = [] if math.isnan(self._loss) else [f"loss {self._loss:.3f}"]
        if not math.isnan(self._rate):
            every = max(1, state.eval_steps or 1)
            evaluations = math.ceil(state.max_steps / every) - step // every
            left = (self._tokens(state.max_steps) - self._tokens(step)) / self._rate
            parts += [f"{tqdm.format_interval(left + evaluations * self._evaluation_seconds)} left", self._speed()]
        parts += [_memory(), f"lr {self._trainer.lr_scheduler.get_last_lr()[0]:.1e}"]
        parts += [] if math.isnan(self._norm) else [f"grad {self._norm:.2f}"]
        parts.append(f"epoch {step / self._steps_per_epoch:.2f}")
        self._bar.set_description_str(" · ".join(parts))

    def _speed(self) -> str:
        """Tokens a second of all processes, and on a known card the share of the rate of its matrix products."""
        text = f"{self._rate:,.0f} tok/s"
        if self._peak_rate:
            share = self._rate * self._operations_per_token / (self._peak_rate * distributed.world_size())
            text += f" ({share:.0%} of peak)"
        return text


def _memory() -> str:
    """Memory in use, and what there is: of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        used, limit = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    else:
        used, limit = memory_used(), memory_limit()
    return f"{used / 2**30:.1f}/{limit / 2**30:.0f} GiB"


_PASSED_ON = 10.0  # seconds after a signal in which the same one is the launcher's


class StopOnSignal(TrainerCallback):
    """The first SIGINT or SIGTERM lets the step or the evaluation end, saves a checkpoint and stops; the second stops at
    once.

    Args:
        resume: the setting of this name, on which depends which command goes on.
    """

    def __init__(self, resume: str = "auto") -> None:
        self.received: int | None = None
        self.command = "the same command" + ("" if resume == "auto" else f" without training.resume: {resume}")
        self._received_at = 0.0
        self._waits_for, self._seconds, self._began, self._saved = "the first step", 0.0, 0.0, 0

    def on_signal(self, number: int, frame: Any) -> None:
        # A batch system may signal all processes of a job, and the launcher passes on what it gets itself.
        passed_on = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._received_at < _PASSED_ON
        # The launcher also ends the others of a run in which one process has failed.
        if distributed.any_failed() or (self.received is not None and not (number == self.received and passed_on)):
            exit_now(number, message=f"stopped at once; {self.command} resumes from the last checkpoint, if any")
        if self.received is not None:
            return
        self.received, self._received_at = number, time.monotonic()
        if distributed.is_first():
            back = f"resumes from step {self._saved:,}" if self._saved else "starts at step 0"
            write_to_stderr(
                f"\nstopping after {self._waits_for} and a checkpoint; once more to stop at once, and {self.command} {back}"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._saved = state.global_step
        self._waits_for = "the evaluation, the first step" if args.eval_on_start else "the first step"

    def on_step_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._began = time.monotonic()
        about = f" (about {self._seconds:.0f} s)" if self._seconds >= 1 else ""
        self._waits_for = f"step {state.global_step + 1:,}{about}"

    def on_step_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._seconds, self._waits_for = time.monotonic() - self._began, "the evaluation, its samples"
        self._stop_if_signalled(control)
        control.should_log |= control.should_training_stop
        control.should_save |= control.should_training_stop

    def on_save(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        self._saved = state.global_step
        self._stop_if_signalled(control)

    def _stop_if_signalled(self, control: Any) -> None:
        # The signal reaches several processes in different steps; they stop after the same one.
        # One that arrives while they agree counts for the next time.
        if agreed := distributed.all_reduce_max(self.received or 0):
            self.received = agreed
            control.should_training_stop = True
