"""`train.py --dry-run`: what training will take in memory, steps and time, before a weight is loaded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.model.base import device
from kestrel.model.loss import attach_token_nll, token_nll
from kestrel.planning.memory import GIB, Estimator, Pass
from kestrel.planning.passes import Dialogues, Plan, capacity, choose, without_estimate
from kestrel.planning.random_base import stand_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WARM_UP, _TIMED = 3, 12  # passes
_NOTICEABLE = 0.02  # of the peak; a change that saves less is not worth making


def report(settings: Settings, config: PretrainedConfig, dialogues: Dialogues) -> None:
    """Prints it.

    Args:
        settings: of the run.
        config: the base's architecture.
        dialogues: of the run.

    Raises:
        KestrelError: training does not fit the graphics card that was found or named.
    """
    memory = capacity(settings)
    estimator = Estimator(settings, config)
    if memory is None:
        chosen = _estimated(without_estimate(settings), estimator, dialogues)
    else:
        chosen = choose(settings, estimator, memory, dialogues)
    _print_memory(settings, estimator, chosen, dialogues)
    _print_work(settings, chosen, dialogues)
    if device().type != "cuda":
        print("time: not measured, there is no GPU here")
    elif chosen.fits:
        print(f"time: {_measured(settings, config, chosen, dialogues)}")
    else:
        print("time: not measured, it does not fit")
    if not chosen.fits:
        raise KestrelError(
            "training does not fit; in order of effect:\n  "
            + "\n  ".join(_changes(settings, config, estimator, chosen, dialogues))
        )


def _estimated(plan: Plan, estimator: Estimator, dialogues: Dialogues) -> Plan:
    shape = dialogues.largest(plan.tokens_per_step)
    return Plan(plan.tokens_per_step, plan.recompute, estimator.estimate(shape, plan.recompute))


def _print_memory(settings: Settings, estimator: Estimator, chosen: Plan, dialogues: Dialogues) -> None:
    estimate = chosen.estimate
    assert estimate is not None
    unit, name_of_unit = (GIB, "GiB") if estimate.peak > GIB else (2**20, "MiB")
    largest = dialogues.largest(chosen.tokens_per_step)
    held = settings.quantization.type if settings.quantization.bits == 4 else settings.quantization.compute_dtype
    rows = [
        (f"base: {estimator.parameters / 1e6:,.1f}M parameters in {held}", estimate.base),
        (f"adapter: {estimator.trainable / 1e6:,.1f}M parameters in float32", estimate.adapter),
        ("the adapter's gradients", estimate.gradients),
        (f"state of {settings.training.optimizer}", estimate.optimizer),
        (f"kept for the backward pass of {largest.rows} x {largest.length:,} tokens", estimate.kept),
        (f"besides, at the worst moment (logits {estimate.logits / unit:.2f} at theirs)", estimate.momentary),
        ("workspace of the matrix products", estimate.workspace),
        ("peak of all tensors", estimate.peak),
        ("with the allocator's slack and CUDA's context", estimate.needed),
    ]
    print(f"\n{'memory, by estimate':<62}{name_of_unit:>8}\n{'─' * 70}")
    for index, (name, size) in enumerate(rows):
        if index == len(rows) - 2:
            print("─" * 70)
        print(f"{name:<62}{size / unit:>8.2f}")
    if chosen.memory is None:
        print("no graphics card found; name one to compare with: --training.device_memory 24GiB")
    else:
        whose = "named" if settings.training.device_memory else "free on " + torch.cuda.get_device_name()
        verdict = "it fits" if chosen.fits else "it does not fit"
        print(f"{f'the graphics card ({whose}): {verdict}':<62}{chosen.memory / unit:>8.2f}")


def _print_work(settings: Settings, chosen: Plan, dialogues: Dialogues) -> None:
    asked = settings.training
    print()
    for key, given, value in (
        ("tokens_per_step", asked.tokens_per_step, f"{chosen.tokens_per_step:,}"),
        ("recompute", asked.recompute, chosen.recompute),
    ):
        print(f"training.{key}: {value}" + (", chosen for auto" if given == "auto" else ""))
    passes = dialogues.passes(chosen.tokens_per_step)
    padded = sum(one.tokens for one in passes)
    print(
        f"{dialogues.steps:,} steps, {len(passes):,} passes, {dialogues.tokens:,} tokens, "
        f"{1 - dialogues.tokens / padded:.1%} of what is computed is padding"
    )


def _measured(settings: Settings, config: PretrainedConfig, chosen: Plan, dialogues: Dialogues) -> str:
    """Times some of the run's passes on a stand-in for the base."""
    passes = dialogues.passes(chosen.tokens_per_step)
    here = device()
    try:
        model = stand_in(settings, config, here)
        attach_token_nll(model, chosen.recompute)
        seconds, tokens = time_passes(model.train(), _sample(passes, dialogues.largest(chosen.tokens_per_step)), here)
    except torch.OutOfMemoryError:
        return "not measured, memory ran out; lower training.tokens_per_step"
    padded = sum(one.tokens for one in passes)
    peak = f", {torch.cuda.max_memory_allocated() / GIB:.1f} GiB at the peak" if here.type == "cuda" else ""
    return (
        f"about {_spoken(padded / tokens * seconds)} of training, from {_TIMED} passes with arbitrary weights "
        f"({tokens / seconds:,.0f} tokens/s, padding included{peak}); loading, evaluations and samples come on top"
    )


def _sample(passes: list[Pass], largest: Pass) -> list[Pass]:
    """Some passes to warm up with, the largest among them, and some to time, spread over the run."""
    spread = [passes[index * (len(passes) - 1) // (_TIMED - 1)] for index in range(_TIMED)]
    return [largest, *spread[: _WARM_UP - 1], *spread]


def time_passes(model: Any, shapes: list[Pass], place: torch.device) -> tuple[float, int]:
    """Seconds and tokens of forward and backward over passes of random tokens, after a warm-up.

    Args:
        model: prepared by `loss.attach_token_nll`.
        shapes: of the passes; the first three are not timed.
        place: where the model is.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    began, tokens = 0.0, 0
    for index, shape in enumerate(shapes):
        if index == _WARM_UP:
            _wait(place)
            began = time.monotonic()
        ids = torch.randint(vocabulary, (shape.rows, shape.length), device=place)
        predicting = torch.arange(min(shape.supervised, shape.tokens - 1), device=place)
        token_nll(model, {"input_ids": ids, "labels": ids, "predicting": predicting}).mean().backward()
        tokens += shape.tokens if index >= _WARM_UP else 0
    _wait(place)
    return time.monotonic() - began, tokens


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _changes(
    settings: Settings, config: PretrainedConfig, estimator: Estimator, chosen: Plan, dialogues: Dialogues
) -> list[str]:
    """What would take less, each on its own and by the same estimate, the most effective first."""
    assert chosen.estimate is not None
    shape = dialogues.largest(chosen.tokens_per_step)
    one = dialogues.filled(dialogues.longest)
    smallest = f"training.tokens_per_step: {dialogues.longest}"

    def other(section: str, **values: Any) -> int:
        changed = getattr(settings, section).model_copy(update=values)
        return (
            Estimator(settings.model_copy(update={section: changed}), config).estimate(shape, chosen.recompute).needed
        )

    found = []
    if settings.quantization.bits != 4:
        found.append(("quantization.bits: 4", other("quantization", bits=4)))
    for level in estimator.levels[estimator.levels.index(chosen.recompute) + 1 :]:
        found.append((f"training.recompute: {level}", estimator.estimate(shape, level).needed))
    if shape.rows > 1:
        found.append((f"{smallest}, a dialogue at a time", estimator.estimate(one, chosen.recompute).needed))
    else:
        half = Pass(1, -(-shape.length // 2), -(-shape.supervised // 2))
        shorter = f"prompt.max_length: {half.length}, and preprocess.py again"
        found.append((shorter, estimator.estimate(half, chosen.recompute).needed))
    found.append((f"lora.r: {max(1, settings.lora.r // 2)}", other("lora", r=max(1, settings.lora.r // 2))))
    if settings.training.optimizer != "paged_adamw_8bit":
        found.append(("training.optimizer: paged_adamw_8bit", other("training", optimizer="paged_adamw_8bit")))
    if shape.rows > 1 and chosen.recompute != "full":
        found.append((f"both training.recompute: full and {smallest}", estimator.estimate(one, "full").needed))
    needed = chosen.estimate.needed
    return [
        f"{name}  ({_amount(needed - less)} less: {_amount(less)})"
        for name, less in sorted(found, key=lambda item: item[1])
        if needed - less > _NOTICEABLE * chosen.estimate.peak
    ]


def _amount(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
