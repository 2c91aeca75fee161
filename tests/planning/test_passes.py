"""Passes: what fits is chosen, and the fastest of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from make_models import settings_of

from kestrel.config.settings import Settings, Training
from kestrel.data.dataset import load_split, supervised_of
from kestrel.errors import KestrelError
from kestrel.planning import passes
from kestrel.planning.memory import CONTEXT, CannotEstimate, Estimate, Pass
from kestrel.planning.passes import Dialogues, Plan, best_plan

LENGTHS = st.lists(st.integers(20, 400), min_size=4, max_size=60).map(np.asarray)


def settings_for(**training: Any) -> Settings:
    return settings_of(training=Training(**training))


class Arithmetic:
    """An estimator of a fixed number of bytes per token, by level, and a bend where the logits' chunk is full."""

    levels, on_cpu, saturating = ("none", "mlp", "full"), False, 6000

    def __init__(self, embedding: int = 0, busy: int = 0):
        self.embedding, self.busy = embedding, busy

    def estimate(self, shape: Pass, level: str, on_host: bool = False) -> Estimate:
        kept = shape.tokens * {"none": 2_000_000, "mlp": 900_000, "full": 300_000}[level]
        base = 4 * 2**30 - on_host * self.embedding
        return Estimate(base, 0, 0, kept, min(shape.supervised, 512) * 600_000)


def dialogues_of(lengths: np.ndarray, batch_size: int) -> Dialogues:
    steps = np.array_split(np.arange(len(lengths)), -(-len(lengths) // batch_size))
    return Dialogues(lengths, lengths // 3, steps)


@hypothesis_settings(deadline=None)
@given(LENGTHS, st.integers(1, 32), st.integers(4, 60), st.sampled_from([0, 2**30]), st.sampled_from([0, 2000]))
def test_the_fastest_passes_that_fit_are_chosen(lengths, batch_size, gib, embedding, busy):
    dialogues, estimator, memory = dialogues_of(lengths, batch_size), Arithmetic(embedding, busy), gib * 2**30
    chosen = best_plan(settings_for(), estimator, memory, dialogues)
    useful = max(dialogues.longest, min(dialogues.most_tokens, estimator.saturating))

    def most_that_fits(level: str, on_host: bool) -> int | None:
        sizes = [dialogues.longest, *range(dialogues.longest, useful, 64), useful]
        fitting = (n for n in sizes if estimator.estimate(dialogues.filled(n), level, on_host).needed <= memory)
        return max(fitting, default=None)

    ways = [(level, on_host) for level in estimator.levels for on_host in {False, bool(embedding)}]
    sizes = {way: size for way in ways if (size := most_that_fits(*way))}
    assert chosen.fits == bool(sizes)
    if not chosen.fits:
        way = (dialogues.longest, "full", bool(embedding))
        assert (chosen.tokens_per_step, chosen.recompute, chosen.embedding_on_host) == way
        return
    assert dialogues.longest <= chosen.tokens_per_step <= useful
    assert chosen.tokens_per_step * 1.1 + 128 >= sizes[chosen.recompute, chosen.embedding_on_host]
    least = min(passes.work_of(Plan(size, *way), dialogues, busy) for way, size in sizes.items())
    assert passes.work_of(chosen, dialogues, busy) <= 1.1 * least + 2 * (busy + passes._WORK_OF_A_PASS)


def test_on_a_fast_card_larger_passes_are_worth_recomputation():
    dialogues = dialogues_of(np.full(256, 300), 32)

    def chosen(gib: int, busy: int) -> tuple[str, bool]:
        plan = best_plan(settings_for(), Arithmetic(2**30, busy), gib * 2**30, dialogues)
        return plan.recompute, plan.embedding_on_host

    assert [chosen(gib, busy=0) for gib in (40, 10, 5)] == [("none", False), ("none", False), ("full", True)]
    assert [chosen(gib, busy=4000) for gib in (40, 10, 5)] == [("none", False), ("mlp", False), ("full", True)]


@pytest.mark.parametrize(("gib", "expected"), [(40, "dense"), (25, "none")])
def test_weights_stay_dense_only_where_much_memory_is_left(gib, expected):
    class Denser(Arithmetic):
        levels = ("dense", *Arithmetic.levels)

        def estimate(self, shape: Pass, level: str, on_host: bool = False) -> Estimate:
            dense = level == "dense"
            estimate = super().estimate(shape, "none" if dense else level, on_host)
            return replace(estimate, kept=estimate.kept + dense * 6 * 2**30)

    dialogues, estimator = dialogues_of(np.full(256, 150), 32), Denser()
    plan = best_plan(settings_for(), estimator, gib * 2**30, dialogues)
    assert plan.recompute == expected and plan.fits
    set_to = best_plan(settings_for(recompute="dense"), estimator, gib * 2**30, dialogues)
    assert set_to.recompute == "dense" and set_to.fits
    estimator.on_cpu = True
    assert best_plan(settings_for(), estimator, gib * 2**30, dialogues).recompute == "none"


def test_a_sharded_base_keeps_no_dense_weights(tmp_path, monkeypatch):
    """Neither if asked to, nor because the run began without sharding."""
    monkeypatch.setattr(passes, "Estimator", refuse)
    passes.write_passes(tmp_path, settings_for(), Plan(100, "dense"))
    found = [passes.plan_passes(settings_for(), None, None, tmp_path, sharded).recompute for sharded in (False, True)]  # type: ignore[arg-type]
    assert found == ["dense", "none"]
    with pytest.raises(KestrelError, match="training.recompute: dense keeps all weights"):
        passes.plan_passes(settings_for(recompute="dense"), None, None, sharded=True)  # type: ignore[arg-type]


def test_given_values_are_kept():
    def chosen_for(**training: Any) -> Plan:
        return best_plan(settings_for(**training), Arithmetic(), 8 * 2**30, dialogues_of(np.full(32, 300), 32))

    chosen = chosen_for(tokens_per_step=3000)
    assert (chosen.tokens_per_step, chosen.recompute, chosen.fits) == (3000, "mlp", True)
    chosen = chosen_for(recompute="none")
    assert chosen.recompute == "none" and 300 <= chosen.tokens_per_step < 2048
    chosen = chosen_for(recompute="none", tokens_per_step=9000)
    assert (chosen.tokens_per_step, chosen.recompute, chosen.fits) == (9000, "none", False)


def refuse(*_: Any) -> None:
    raise CannotEstimate("the memory of a mamba cannot be estimated")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, ""),  # no GPU
        ({"device_memory": "24GiB"}, "warning: the memory of a mamba cannot be estimated"),
        ({"dense_weights": True}, "training.dense_weights has no effect any more"),  # of older configs
    ],
)
def test_without_an_estimate_numbers_are_fixed(training, message, monkeypatch, capsys):
    monkeypatch.setattr(passes, "Estimator", refuse)
    chosen = passes.plan_passes(settings_for(**training), None, None)  # type: ignore[arg-type]  neither is looked at
    assert (chosen.tokens_per_step, chosen.recompute) == (4096, "none")
    assert message in capsys.readouterr().err


def test_the_named_or_free_memory_of_a_gpu_is_taken(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * gib, 24 * gib))
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    unnamed, small, large = settings_for(), settings_for(device_memory="12GiB"), settings_for(device_memory="80 GB")
    assert passes.available_memory(unnamed) == passes.available_memory(large) == 20 * gib + CONTEXT
    assert passes.available_memory(small) == 12 * gib
    assert passes.available_memory(large, is_planned=True) == 80 * 10**9
    passes.limit_gpu_memory(unnamed)
    passes.limit_gpu_memory(small)
    assert limits == [pytest.approx((12 * gib - CONTEXT) / (24 * gib))]


def test_a_machine_without_a_gpu_has_no_more_than_its_own_memory_whatever_is_named(monkeypatch):
    monkeypatch.setattr(passes, "memory_used", lambda: 2 * 2**30)
    monkeypatch.setattr(passes, "memory_available", lambda: 6 * 2**30)
    large, small = settings_for(device_memory="900GiB"), settings_for(device_memory="1GiB")
    assert passes.available_memory(large) == 8 * 2**30 and passes.available_memory(small) == 2**30
    assert passes.available_memory(large, is_planned=True) == 900 * 2**30


def test_supervised_tokens_are_the_labels(prepared):
    rows = load_split(prepared.run / "dataset", "train", "")
    labels = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert supervised_of(rows).tolist() == labels
    assert supervised_of(rows.select([5, 2, 2])).tolist() == [labels[5], labels[2], labels[2]]


@hypothesis_settings(deadline=None)
@given(LENGTHS, st.integers(1, 32), st.integers(100, 4000))
def test_passes_hold_every_dialogue_within_the_budget(lengths, batch_size, budget):
    dialogues = dialogues_of(lengths, batch_size)
    made = dialogues.passes(budget)
    assert sum(one.rows for one in made) == len(lengths)
    assert sum(one.supervised for one in made) == (lengths // 3).sum()
    largest = dialogues.largest(budget)
    assert all(one.rows == 1 or one.tokens <= budget for one in made)
    assert all(one.tokens <= largest.tokens and one.supervised <= largest.supervised for one in made)
