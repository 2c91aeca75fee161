"""How many tokens a forward pass holds and what the backward pass recomputes: as configured, or what fits the device."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kestrel.batching import even_batches_within, share_of
from kestrel.config.settings import Settings, memory_bytes
from kestrel.errors import KestrelError
from kestrel.model.base import device
from kestrel.model.decoder_layer import Recompute
from kestrel.planning.memory import CONTEXT, GIB, CannotEstimate, Estimate, Estimator, Pass
from kestrel.runtime import distributed
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.machine import memory_available, memory_used

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WITHOUT_A_GPU = 4096  # tokens: on a CPU larger passes are no faster
# What a token takes, by what is recomputed, and what a pass takes beside its tokens, in tokens, since it makes the weights dense:
# about what docs/performance.md has of Falcon-7B and Qwen2.5-7B.
_WORK: dict[Recompute, float] = {"dense": 0.975, "none": 1.0, "mlp": 1.25, "full": 1.32}
_WORK_OF_A_PASS = 150
_MOST_FOR_DENSE = 0.6  # of the memory: so little time is saved with dense weights that the rest is left to others
_WAITS_FOR_HOST = 1.05  # times the rest, where each pass waits for its tokens' rows of the embedding
_STEP = 64  # tokens
_TRIALS = 5
_RECORD = "passes.json"  # in a checkpoint


@dataclass(frozen=True)
class Plan:
    """How a run cuts its steps into passes."""

    tokens_per_step: int  # most tokens, padding included, in one pass
    recompute: Recompute
    embedding_on_host: bool = False
    estimate: Estimate | None = None
    memory: int | None = None  # available bytes, if they were compared

    @property
    def fits(self) -> bool:
        """By the estimate, if any."""
        return self.estimate is None or self.memory is None or self.estimate.needed <= self.memory


def available_memory(settings: Settings, is_planned: bool = False) -> int:
    """Bytes of memory for training: training.device_memory, as far as it is there, else what is free on the GPU now; without
    one, what this process has and what the machine or its container still has.

    The process with the least memory decides, so that all make the same passes.

    Args:
        is_planned: for a device that is named and need not be the one that is here.
    """
    named = memory_bytes(settings.training.device_memory)
    if named is not None and is_planned:
        return named
    if not torch.cuda.is_available():
        found = memory_used() + memory_available()
        return found if named is None else min(named, found)
    free, total = torch.cuda.mem_get_info(device())
    found = min(total, free + CONTEXT)  # this process has its context already
    return distributed.all_reduce_min(found if named is None else min(named, found))


def limit_gpu_memory(settings: Settings) -> None:
    """Limits this process to training.device_memory, if set."""
    named = memory_bytes(settings.training.device_memory)
    if named is not None and torch.cuda.is_available():
        total = torch.cuda.mem_get_info(device())[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, named - CONTEXT) / total), device())


class Dialogues:
    """The training dialogues of each step, and the passes they make.

    Args:
        lengths: int64 (rows,), tokens of each row.
        supervised: int64 (rows,), tokens with a label.
        steps: row numbers of each optimizer step, over all processes.
    """

    def __init__(self, lengths: np.ndarray, supervised: np.ndarray, steps: Sequence[np.ndarray]):
        self._supervised = supervised
        self._shares = [step[share_of(lengths[step], 0, distributed.world_size())] for step in steps]
        self._lengths = lengths
        used = np.unique(np.concatenate(self._shares))
        self.steps = len(steps)
        self.tokens = int(sum(lengths[share].sum() for share in self._shares))
        self.longest = int(lengths[used].max())
        self.most_tokens = max(len(share) * int(lengths[share].max()) for share in self._shares)
        self._density = float((supervised[used] / lengths[used]).max())

    def passes(self, tokens_per_step: int) -> list[Pass]:
        """All passes of the run, in order."""
        return [
            Pass(len(cut), int(self._lengths[share[cut]].max()), int(self._supervised[share[cut]].sum()))
            for share in self._shares
            for cut in even_batches_within(self._lengths[share], tokens_per_step)
        ]

    def largest(self, tokens_per_step: int) -> Pass:
        """A pass that takes at least as much memory as any of the run."""
        passes = self.passes(tokens_per_step)
        widest = max(passes, key=lambda one: one.tokens)
        return Pass(widest.rows, widest.length, max(one.supervised for one in passes))

    def filled(self, tokens: int) -> Pass:
        """A pass of that many tokens, of the longest and most densely supervised dialogues."""
        rows = -(-tokens // self.longest)
        return Pass(rows, tokens // rows, int(tokens * self._density))


def plan_passes(
    settings: Settings,
    config: PretrainedConfig,
    dialogues: Dialogues,
    checkpoint: Path | None = None,
    sharded: bool = False,
) -> Plan:
    """The checkpoint's plan if it was made for the same settings; else the settings, with what fits the device for auto.

    Raises:
        KestrelError: dense weights of a base that is sharded.
    """
    refuse_dense_shards(settings, sharded)
    if settings.training.dense_weights:
        print(
            "note: training.dense_weights has no effect any more; training.recompute: dense does what it did",
            file=sys.stderr,
        )
    recorded = read_passes(checkpoint, settings) if checkpoint is not None else None
    if recorded is not None and not (sharded and recorded.recompute == "dense"):
        return recorded
    memory = available_memory(settings)
    is_set = settings.training.tokens_per_step != "auto" and settings.training.recompute != "auto"
    if is_set and torch.cuda.is_available():
        return configured_plan(settings)
    try:
        return fitting_plan(settings, Estimator(settings, config, sharded), memory, dialogues)
    except CannotEstimate as error:
        print(f"warning: {error}", file=sys.stderr)
        return configured_plan(settings)


def refuse_dense_shards(settings: Settings, sharded: bool) -> None:
    """Refuses dense weights of a base that is sharded.

    Raises:
        KestrelError: both are asked for.
    """
    if sharded and settings.training.recompute == "dense":
        raise KestrelError(
            "training.recompute: dense keeps all weights in each process, and FSDP is there to split them; take none"
        )


def configured_plan(settings: Settings) -> Plan:
    """The settings' values, and fixed ones for auto."""
    tokens, recompute = settings.training.tokens_per_step, settings.training.recompute
    return Plan(WITHOUT_A_GPU if tokens == "auto" else tokens, "none" if recompute == "auto" else recompute)


def fitting_plan(settings: Settings, estimator: Estimator, memory: int, dialogues: Dialogues) -> Plan:
    """The best plan; without a GPU, where larger passes are no faster, the configured one if it fits.

    Raises:
        CannotEstimate: the architecture cannot be run on shapes alone.
    """
    if estimator.on_cpu:
        plan = configured_plan(settings)
        shape = dialogues.largest(plan.tokens_per_step)
        plan = replace(plan, estimate=estimator.estimate(shape, plan.recompute), memory=memory)
        if plan.fits:
            return plan
    return best_plan(settings, estimator, memory, dialogues)


def best_plan(settings: Settings, estimator: Estimator, memory: int, dialogues: Dialogues) -> Plan:
    """The plan that should be fastest, of those that fit into `memory` bytes: with less recomputation, passes hold fewer tokens,
    and there are more of them.

    Where nothing fits, the plan that needs least.

    Raises:
        CannotEstimate: the architecture cannot be run on shapes alone.
    """
    asked = settings.training
    levels: list[Recompute] = estimator.levels if asked.recompute == "auto" else [asked.recompute]
    if asked.recompute == "auto" and estimator.on_cpu:
        levels = [level for level in levels if level != "dense"]
    most = min(dialogues.most_tokens, WITHOUT_A_GPU if estimator.on_cpu else estimator.saturating)
    most = max(dialogues.longest, most) if asked.tokens_per_step == "auto" else asked.tokens_per_step
    # Of the slowest card, so that all processes make the same passes.
    work = functools.partial(work_of, dialogues=dialogues, busy=distributed.all_reduce_min(estimator.busy))
    best: Plan | None = None
    for on_host, level in product((False, True) if estimator.embedding else (False,), levels):
        if best is not None and best.fits and work(best) <= work(Plan(most, level, on_host)):
            continue  # this could not be faster

        def planned(tokens: int, shape: Pass | None = None, level: Recompute = level, on_host: bool = on_host) -> Plan:
            estimate = estimator.estimate(shape or dialogues.filled(tokens), level, on_host)
            return Plan(tokens, level, on_host, estimate, memory)

        if asked.tokens_per_step == "auto":
            found = _largest_that_fits(planned, dialogues.longest, most)
        else:
            found = planned(most, dialogues.largest(most))
        assert found.estimate is not None
        if asked.recompute == "auto" and level == "dense" and found.estimate.needed > _MOST_FOR_DENSE * memory:
            continue
        if best is None or not best.fits or (found.fits and work(found) < work(best)):
            best = found
    assert best is not None
    return best


def work_of(plan: Plan, dialogues: Dialogues, busy: int) -> float:
    """What a run should take, in tokens without recomputation.

    Args:
        busy: of `Estimator`.
    """
    passes = dialogues.passes(plan.tokens_per_step)
    tokens = sum(max(busy, one.tokens) for one in passes)
    work = _WORK[plan.recompute] * tokens + _WORK_OF_A_PASS * len(passes)
    return work * (_WAITS_FOR_HOST if plan.embedding_on_host else 1)


def _largest_that_fits(planned: Callable[[int], Plan], low: int, high: int) -> Plan:
    """The largest plan between two numbers of tokens that fits, else the lowest; memory grows almost linearly with them."""
    best, most = planned(low), planned(high)
    if most.fits or not best.fits:
        return most if most.fits else best
    for _ in range(_TRIALS):
        assert best.estimate is not None and most.estimate is not None and best.memory is not None
        slope = (most.estimate.needed - best.estimate.needed) / (most.tokens_per_step - best.tokens_per_step)
        more = (best.memory - best.estimate.needed) / slope
        tokens = int(best.tokens_per_step + more) // _STEP * _STEP
        if not best.tokens_per_step < tokens < most.tokens_per_step:
            break
        trial = planned(tokens)
        best, most = (trial, most) if trial.fits else (best, trial)
    return best


def remedies(settings: Settings, recompute: Recompute, smaller_passes: bool = False) -> str:
    """Which settings to change when memory runs out; `recompute` is in use, `smaller_passes` are possible."""
    changes = ["lower training.tokens_per_step"] if smaller_passes else []
    if settings.quantization.bits != 4:
        changes.append("set quantization.bits: 4")
    if recompute != "full":
        changes.append("set training.recompute: full")
    changes.append("lower prompt.max_length and run preprocess.py again")
    if settings.lora.target_modules == "all-linear" or len(settings.lora.target_modules) > 1:
        changes.append("name fewer layers in lora.target_modules")
    if settings.training.optimizer != "paged_adamw_8bit":
        changes.append("set training.optimizer: paged_adamw_8bit")
    return "most effective first: " + ", ".join(changes)


def print_plan(settings: Settings, plan: Plan) -> None:
    """Prints a plan that has an estimate, and warns where it does not fit."""
    if plan.estimate is None or plan.memory is None:
        return
    needed, memory = f"{plan.estimate.needed / GIB:.1f}", f"{plan.memory / GIB:.1f}"
    passes = f"passes of up to {plan.tokens_per_step:,} tokens, recompute {plan.recompute}"
    where = ", the embedding in the machine's memory" if plan.embedding_on_host else ""
    print(f"{passes}{where}: about {needed} of {memory} GiB of memory")
    if not plan.fits:
        changes = remedies(settings, plan.recompute, settings.training.tokens_per_step != "auto")
        print(f"warning: training needs about {needed} GiB and has {memory}; {changes}", file=sys.stderr)


def write_passes(checkpoint: Path, settings: Settings, plan: Plan) -> None:
    """Records the plan in a checkpoint. Dropout depends on the passes, so a resumed run must make the same ones."""
    chosen = {name: getattr(plan, name) for name in ("tokens_per_step", "recompute", "embedding_on_host")}
    write_json(checkpoint / _RECORD, {"asked": _asked(settings), "chosen": chosen})


def read_passes(checkpoint: Path, settings: Settings) -> Plan | None:
    """The plan that a checkpoint records; None without one, or if it was made for other settings."""
    if not (checkpoint / _RECORD).exists():
        return None
    record = read_json(checkpoint / _RECORD, "start again with --training.resume never")
    return Plan(**record["chosen"]) if record["asked"] == _asked(settings) else None


def _asked(settings: Settings) -> dict[str, int | str | None]:
    return settings.training.model_dump(include={"tokens_per_step", "recompute", "device_memory"})
