"""Batches are as large as the memory holds, and smaller where it runs out; no answer shows it."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from make_models import make_model, make_tokenizer
from test_prefix_cache import dialogues_in

from kestrel.config.settings import Generation
from kestrel.generation import prefix_cache, respond
from kestrel.generation.answers import answer
from kestrel.generation.respond import budget_of
from kestrel.model import budget, likelihood
from kestrel.model.budget import Budget
from kestrel.prompt.prompt import Prompt


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(make_tokenizer(), "plain", 100)


def test_on_a_cpu_a_quarter_of_what_the_container_has_is_free(monkeypatch):
    monkeypatch.setattr(budget, "memory_available", lambda: 4 * 2**30)
    assert budget.free_memory(torch.device("cpu")) == 2**30


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 400), st.integers(1, 9))
@settings(deadline=None)
def test_all_is_done_once_in_order_and_after_a_failure_in_half(models, lengths, tokens, room):
    allowed, tried = Budget(models["llama"], tokens), []

    def run(rows):
        tried.append(len(rows))
        if len(rows) > room:
            raise torch.OutOfMemoryError
        return [lengths[row] for row in rows]

    done = [(rows, result) for rows, result in allowed.passes(lengths, run)]
    assert [row for rows, _ in done for row in rows] == sorted(range(len(lengths)), key=lambda row: -lengths[row])
    assert all(result == [lengths[row] for row in rows] for rows, result in done)
    assert all(after <= max(1, before // 2) for before, after in itertools.pairwise(tried) if before > room)


def test_one_row_that_does_not_fit_fails_and_so_does_any_other_error():
    for error in (torch.OutOfMemoryError("too large"), RuntimeError("a bug")):

        def run(rows, error=error):
            raise error

        with pytest.raises(type(error), match=str(error)):
            list(Budget(make_model(), 1).passes([5, 4], run))


@pytest.mark.parametrize("by", ["falcon", "mistral"], ids=["own decoding", "the library's"])
def test_answers_are_the_same_where_memory_runs_out(models, prompt, by, monkeypatch):
    """On the CPU, whose allocator has an error of its own; of passes over dialogues, answers and candidates."""
    model, asked = models[by], dialogues_in(prompt)
    chosen = Generation(max_new_tokens=6, candidates=True)
    expected = answer(model, prompt, asked, chosen, 0)
    failed = []

    def fails_above(rows: int, module: Any, name: str, counted: Any) -> None:
        own = getattr(module, name)

        def limited(*arguments, **named):
            if counted(arguments) > rows:
                failed.append(name)
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
            return own(*arguments, **named)

        monkeypatch.setattr(module, name, limited)

    fails_above(2, prefix_cache, "whole_pass", lambda arguments: len(arguments[1]))
    fails_above(2, prefix_cache, "continuing_pass", lambda arguments: len(arguments[1]))
    fails_above(2, respond, "decode", lambda arguments: len(arguments[2]))
    fails_above(2, respond, "generate", lambda arguments: len(arguments[2]))
    fails_above(2, likelihood, "token_nll", lambda arguments: len(arguments[1]["input_ids"]))
    found = answer(model, prompt, asked, chosen, 0)
    assert set(failed) == ({"whole_pass", "continuing_pass", "decode"} if by == "falcon" else {"generate", "token_nll"})
    for row, other in zip(found, expected, strict=True):
        assert row["response"] == other["response"]
        assert row["reference_nll"] == pytest.approx(other["reference_nll"], rel=1e-4)
        assert [n for pair in row["candidate_nll"] for n in pair] == pytest.approx(
            [n for pair in other["candidate_nll"] for n in pair], rel=1e-4
        )


def test_auto_follows_the_free_memory(models, prompt, monkeypatch):
    model, chosen = models["llama"], Generation()
    assert chosen.tokens_per_step == "auto"
    kept = 2 * 2 * 2 * 16 * 4  # bytes of a token: keys and values, 2 layers, 2 heads of 16 float32 numbers
    for free in (2**16, 2**24, 2**40):
        monkeypatch.setattr(budget, "free_memory", lambda device, free=free: free)
        made = budget_of(model, chosen)
        assert made.tokens == max(1, min(8192, int(0.2 * free) // (made.bytes_per_position + kept)))
        assert made.continuation_memory(kept) == int(0.4 * free)
        assert [row["response"] for row in answer(model, prompt, dialogues_in(prompt), Generation(max_new_tokens=3), 0)]
    assert budget_of(models["mistral"], Generation(do_sample=True)).tokens == 8192  # the library draws for a batch


def test_free_memory_of_this_machine():
    assert 2**20 < budget.free_memory(torch.device("cpu")) < 2**45
