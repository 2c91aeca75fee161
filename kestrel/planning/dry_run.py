"""`train.py --dry-run`: the memory, steps and time that training takes, without loading weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.model.base import device
from kestrel.model.decoder_layer import Recompute
from kestrel.model.host_embedding import move_embedding_to_host
from kestrel.model.loss import attach_token_nll, token_nll
from kestrel.planning.memory import GIB, Estimator, Needed, Pass
from kestrel.planning.passes import Dialogues, Plan, available_memory, fitting_plan, refuse_dense_shards
from kestrel.planning.random_base import random_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TIMED = 12  # passes
_NOTICEABLE = 0.02  # of the peak; changes that save less are not listed


def report(settings: Settings, config: PretrainedConfig, dialogues: Dialogues, sharded: bool = False) -> None:
    """Prints what training takes; with a sharded base, in each process.

    Raises:
        KestrelError: training does not fit the GPU that was found or named, or this machine where there is none.
    """
    refuse_dense_shards(settings, sharded)
    memory = available_memory(settings, is_planned=True)
    estimator = Estimator(settings, config, sharded)
    plan = fitting_plan(settings, estimator, memory, dialogues)
    assert plan.estimate is not None
    print_memory(settings, estimator, plan.estimate, _parts(settings, estimator, plan, dialogues), plan.memory)
    _print_work(settings, plan, dialogues)
    if device().type != "cuda":
        print("time: not measured, this machine has no GPU")
    elif sharded:
        print("time: not measured with a sharded base")
    elif plan.fits and plan.estimate.needed > available_memory(settings):
        print("time: not measured, the GPU of this machine has less memory")
    elif plan.fits:
        print(f"time: {_measured(settings, config, plan, dialogues)}")
    else:
        print("time: not measured, training does not fit")
    if not plan.fits:
        raise KestrelError(
            "training does not fit; most effective changes first:\n  "
            + "\n  ".join(_changes(settings, config, estimator, plan, dialogues, sharded))
        )


def _parts(settings: Settings, estimator: Estimator, plan: Plan, dialogues: Dialogues) -> list[tuple[str, int]]:
    """What training keeps in memory beside base and adapter."""
    estimate, largest = plan.estimate, dialogues.largest(plan.tokens_per_step)
    assert estimate is not None
    dense = "dense weights, and " if plan.recompute == "dense" else ""
    on_host = [("of the base, the embedding stays in the machine's memory", -estimator.embedding)]
    return [
        *(on_host if plan.embedding_on_host else []),
        ("the adapter's gradients", estimate.adapter),
        (f"state of {settings.training.optimizer}", estimate.optimizer),
        (f"{dense}kept for the backward pass of {largest.rows} x {largest.length:,} tokens", estimate.kept),
        ("more at the peak", estimate.momentary),
    ]


def print_memory(
    settings: Settings, estimator: Estimator, estimate: Needed, parts: Sequence[tuple[str, int]], memory: int | None
) -> None:
    """Prints an estimate as a table, and whether it fits.

    Args:
        parts: names and bytes of what there is beside base, adapter and workspace.
    """
    assert memory is not None
    unit, name_of_unit = (GIB, "GiB") if estimate.peak > GIB else (2**20, "MiB")
    held = settings.quantization.type if settings.quantization.bits == 4 else settings.quantization.compute_dtype
    rows = [
        (f"base: {estimator.parameters / 1e6:,.1f}M parameters in {held}", estimator.base),
        (f"adapter: {estimator.trainable / 1e6:,.1f}M parameters in float32", estimator.adapter),
        *parts,
        ("workspace of the matrix products", estimate.workspace),
        ("peak of all tensors", estimate.peak),
        (f"with the allocator's slack and {'the libraries' if estimator.on_cpu else 'CUDA'}", estimate.needed),
    ]
    print(f"\n{'memory, by estimate':<62}{name_of_unit:>8}\n{'─' * 70}")
    for index, (name, size) in enumerate(rows):
        if index == len(rows) - 2:
            print("─" * 70)
        print(f"{name:<62}{size / unit:>8.2f}")
    verdict = "it fits" if estimate.needed <= memory else "it does not fit"
    if estimator.on_cpu:
        print(f"{f'memory of this machine or container: {verdict}':<62}{memory / unit:>8.2f}")
        print("no GPU found; to plan for one, name its memory: --training.device_memory 24GiB")
    else:
        whose = "named" if settings.training.device_memory else "free on " + torch.cuda.get_device_name()
        print(f"{f'GPU memory ({whose}): {verdict}':<62}{memory / unit:>8.2f}")


def _print_work(settings: Settings, plan: Plan, dialogues: Dialogues) -> None:
    print()
    for key, value in (("tokens_per_step", f"{plan.tokens_per_step:,}"), ("recompute", plan.recompute)):
        print(f"training.{key}: {value}" + (", chosen for auto" if getattr(settings.training, key) == "auto" else ""))
    passes = dialogues.passes(plan.tokens_per_step)
    padded = sum(one.tokens for one in passes)
    print(
        f"{dialogues.steps:,} steps, {len(passes):,} passes, {dialogues.tokens:,} tokens, "
        f"{1 - dialogues.tokens / padded:.1%} of the computed positions are padding"
    )


def _measured(settings: Settings, config: PretrainedConfig, plan: Plan, dialogues: Dialogues) -> str:
    """Times some of the run's passes on a model with random weights."""
    passes = dialogues.passes(plan.tokens_per_step)
    timed = [passes[index * (len(passes) - 1) // (_TIMED - 1)] for index in range(_TIMED)]  # spread over the run
    here = device()
    try:
        model = random_model(settings, config, here)
        if plan.embedding_on_host:
            move_embedding_to_host(model)
        attach_token_nll(model.train(), plan.recompute)
        _seconds_of(model, [dialogues.largest(plan.tokens_per_step), *timed[:2]], here)  # a warm-up
        seconds = _seconds_of(model, timed, here)
    except torch.OutOfMemoryError:
        return "not measured, out of memory; lower training.tokens_per_step"
    rate = sum(one.tokens for one in timed) / seconds
    peak = f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB at the peak" if here.type == "cuda" else ""
    return (
        f"about {_duration(sum(one.tokens for one in passes) / rate)} of training, from {_TIMED} passes with random weights "
        f"({rate:,.0f} tokens/s, padding included{peak}); loading, evaluations and samples are not included"
    )


def _seconds_of(model: Any, shapes: list[Pass], place: torch.device) -> float:
    """The time of forward and backward passes over random tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    began = time.monotonic()
    for shape in shapes:
        ids = torch.randint(vocabulary, (shape.rows, shape.length), device=place)
        predicting = torch.arange(min(shape.supervised, shape.tokens - 1), device=place)
        token_nll(model, {"input_ids": ids, "labels": ids, "predicting": predicting}).mean().backward()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _changes(
    settings: Settings,
    config: PretrainedConfig,
    estimator: Estimator,
    plan: Plan,
    dialogues: Dialogues,
    sharded: bool,
) -> list[str]:
    """Changes that save memory, each estimated on its own, the most effective first."""
    assert plan.estimate is not None
    shape = dialogues.largest(plan.tokens_per_step)
    one = dialogues.filled(dialogues.longest)
    smallest = f"training.tokens_per_step: {dialogues.longest}"

    def other(section: str, **values: Any) -> int:
        changed = getattr(settings, section).model_copy(update=values)
        estimator = Estimator(settings.model_copy(update={section: changed}), config, sharded)
        return estimator.estimate(shape, plan.recompute, plan.embedding_on_host).needed

    def needed_by(shape: Pass, level: Recompute) -> int:
        return estimator.estimate(shape, level, plan.embedding_on_host).needed

    found = {}
    if settings.quantization.bits != 4:
        found["quantization.bits: 4"] = other("quantization", bits=4)
    levels = estimator.levels
    for level in levels[levels.index(plan.recompute) + 1 if plan.recompute in levels else 0 :]:
        found[f"training.recompute: {level}"] = needed_by(shape, level)
    if shape.rows > 1:
        found[f"{smallest}, a dialogue at a time"] = needed_by(one, plan.recompute)
        if plan.recompute != "full":
            found[f"both training.recompute: full and {smallest}"] = needed_by(one, "full")
    else:
        half = Pass(1, -(-shape.length // 2), -(-shape.supervised // 2))
        shorter = f"prompt.max_length: {half.length}, and run preprocess.py again"
        found[shorter] = needed_by(half, plan.recompute)
    rank = max(1, settings.lora.r // 2)
    found[f"lora.r: {rank}"] = other("lora", r=rank)
    if settings.training.optimizer != "paged_adamw_8bit":
        found["training.optimizer: paged_adamw_8bit"] = other("training", optimizer="paged_adamw_8bit")
    needed = plan.estimate.needed
    return [
        f"{name}  ({_amount(needed - less)} less: {_amount(less)})"
        for name, less in sorted(found.items(), key=lambda item: item[1])
        if needed - less > _NOTICEABLE * plan.estimate.peak
    ]


def _amount(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
