"""Prompts that share a dialogue are computed once, and nothing that follows them shows it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from make_models import make_model, make_tokenizer, words

from kestrel.config.settings import Generation
from kestrel.data.dataset import _row
from kestrel.dialogue import Dialogue, Turn
from kestrel.generation.answers import answer, dialogues_of_shard, questions_of
from kestrel.generation.prefix_cache import (
    Continuation,
    compute_prefixes,
    continuation_nll,
    supports_prefixes,
)
from kestrel.generation.respond import decodes_from_prefixes, respond
from kestrel.model.likelihood import SpanRequest, span_nll
from kestrel.prompt.prompt import Prompt

SHARING = ["falcon", "falcon-alibi", "falcon-new", "gpt2", "gpt_neox", "llama", "qwen2", "mistral-wide", "gemma3"]
NOT_SHARING = ["bloom", "mistral"]
IDS = st.integers(12, 380)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(make_tokenizer(), "plain", 100)


def dialogues_in(prompt: Prompt) -> list[list[Any]]:
    """Questions with candidates, of dialogues of several lengths; the longest has lost its oldest turns."""
    rows = []
    for number, (animal, repeat) in enumerate([("cat", 1), ("dog", 2), ("parrot", 1), ("horse", 0)]):
        persona = [f"i have a {animal} .", "my favorite food is rice .", "i live in lima ."]
        turns = words(persona) * repeat or words(persona)[:2]
        replies = len(turns) // 2
        dialogue = Dialogue(
            f"d{number}",
            tuple(persona),
            tuple(Turn(**turn) for turn in turns),
            candidates=tuple(("no .", f"i hate {animal} soup .", "fish") for _ in range(replies)),
        )
        rows.append(_row(dialogue, prompt.render(dialogue)))
    return questions_of(rows, prompt)


# -- rows of a generations file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_base", [False, True])
@pytest.mark.parametrize("architecture", SHARING)
def test_rows_are_those_of_the_plain_way(models, prompt, architecture, as_base, monkeypatch):
    """Answers by the library, each likelihood after a whole prompt of its own; under a small budget and a large one."""
    model, asked = models[architecture], dialogues_in(prompt)
    assert any(question.span is None for questions in asked for question in questions)
    chosen = Generation(max_new_tokens=12, candidates=True)
    disabled = model.disable_adapter() if as_base else torch.no_grad()
    ended: list[list[int]] = [[], []]  # answers, as a progress bar hears of them
    with disabled:
        large = answer(model, prompt, asked, chosen, 0, on_end=ended[0].append)
        small = answer(model, prompt, asked, chosen.model_copy(update={"tokens_per_step": 130}), 0)
        monkeypatch.setattr("kestrel.generation.answers.decodes_from_prefixes", lambda *_: False)
        plain = answer(
            model, prompt, asked, chosen.model_copy(update={"tokens_per_step": 1}), 0, on_end=ended[1].append
        )
    assert [sum(counts) for counts in ended] == [len(large)] * 2 and min(map(len, ended)) > 2
    for expected, *found in zip(plain, large, small, strict=True):
        for row in found:
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                if key == "candidate_nll":
                    assert [tokens for _, tokens in row[key]] == [tokens for _, tokens in value]
                    assert [nll for nll, _ in row[key]] == pytest.approx([nll for nll, _ in value], rel=1e-4)
                else:
                    assert row[key] == (pytest.approx(value, rel=1e-4) if key == "reference_nll" else value)


@pytest.mark.parametrize("architecture", NOT_SHARING)
def test_what_cannot_share_takes_the_plain_way(models, prompt, architecture):
    model, asked = models[architecture], dialogues_in(prompt)
    assert not supports_prefixes(model)
    rows = answer(model, prompt, asked, Generation(max_new_tokens=4, candidates=True), 0)
    contexts = [question.context for questions in asked for question in questions]
    alone = [respond(model, prompt, [context], Generation(max_new_tokens=4))[0].text for context in contexts]
    assert [row["response"] for row in rows] == alone
    assert all(len(row["candidate_nll"]) == 3 and row["reference_nll"] > 0 for row in rows)


def test_beams_and_rotations_that_depend_on_the_length_are_the_librarys():
    model = make_model("llama")
    assert decodes_from_prefixes(model, Generation())
    assert not decodes_from_prefixes(model, Generation(num_beams=2))
    assert not decodes_from_prefixes(make_model("mistral-wide"), Generation(max_new_tokens=100), 201)
    assert decodes_from_prefixes(make_model("mistral-wide"), Generation(max_new_tokens=100), 200)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not decodes_from_prefixes(model, Generation())


def test_no_prompt_is_computed_twice(models, prompt):
    """Positions that enter the model: each sequence once, and of what follows its own tokens."""
    model, asked, seen = models["llama"], dialogues_in(prompt), []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))
    chosen = Generation(max_new_tokens=6, stop_strings=[], tokens_per_step=1)  # so that nothing is padded
    rows = answer(model, prompt, asked, chosen, 0)
    answered = sum(seen)
    scored = answer(model, prompt, asked, chosen.model_copy(update={"candidates": True}), 0)
    hook.remove()
    sequences = 0
    for questions in asked:
        own = [question for question in questions if question.span is None]
        sequences += sum(len(question.context) + len(question.reference) for question in own)
        sequences += len(questions[-1].context) + len(questions[-1].reference)
    assert sum(row["response_tokens"] for row in rows) <= answered - sequences <= 6 * len(rows)
    tokens = [tokens for row in scored for _, tokens in row["candidate_nll"]]
    assert sum(tokens) < sum(seen) - 2 * answered <= len(tokens) * (max(tokens) + 1)


# -- prefixes ----------------------------------------------------------------------------------------------------------


@st.composite
def sharers(draw: st.DrawFn) -> tuple[list[list[int]], list[Continuation]]:
    """Sequences, and what may follow prefixes of them."""
    sequences = draw(st.lists(st.lists(IDS, min_size=2, max_size=40), min_size=1, max_size=4))
    continuations = []
    for _ in range(draw(st.integers(1, 12))):
        which = draw(st.integers(0, len(sequences) - 1))
        length = draw(st.integers(1, len(sequences[which])))
        more = draw(st.lists(IDS, min_size=1, max_size=9))
        continuations.append(Continuation(which, sequences[which][:length], more))
    return sequences, continuations


@pytest.mark.parametrize("architecture", SHARING)
@given(shared=sharers(), budget=st.integers(1, 200))
@settings(max_examples=8, deadline=None)
def test_continuations_cost_what_they_cost_alone(models, architecture, shared, budget):
    model, (sequences, continuations) = models[architecture], shared
    whole = [SpanRequest(ids, [(1, len(ids))]) for ids in sequences]
    found, of_sequences = {}, {}
    for held, scores in compute_prefixes(model, whole, budget):
        mine = [index for index, continuation in enumerate(continuations) if held.holds(continuation.sequence)]
        assert not found.keys() & set(mine)
        nll = continuation_nll(model, held, [continuations[index] for index in mine], budget)
        found |= dict(zip(mine, nll, strict=True))
        of_sequences |= scores
    alone = continuation_nll(model, None, continuations, 1)
    for index, (nll, tokens) in enumerate(alone):
        assert found[index] == (pytest.approx(nll, rel=1e-4, abs=1e-4), tokens)
    for index, [(nll, tokens)] in enumerate(span_nll(model, whole, 1)):
        assert of_sequences[index] == [(pytest.approx(nll, rel=1e-4, abs=1e-4), tokens)]


def test_what_is_held_stays_within_the_budget(models):
    """Groups are handed over before they outgrow half of what the answers may take."""
    model = models["llama"]
    sequences = [SpanRequest([20 + n] * 30, []) for n in range(300)]
    groups = list(compute_prefixes(model, sequences, 60))
    assert len(groups) > 1
    assert sorted(index for held, _ in groups for index in range(300) if held.holds(index)) == list(range(300))
    sizes = [held.nbytes for held, _ in groups]
    a_pass = 60 * groups[0][0].bytes_per_token
    activations = 60 * 24 * 64 * 4  # hidden states of 64 float32 numbers, as in kestrel.prefix
    assert max(sizes) <= max(activations, a_pass) / 2 + a_pass


def test_rows_that_leave_change_nothing_for_those_that_stay(models):
    model, ids = models["falcon"], [30, 40, 50, 60, 70]
    groups = compute_prefixes(model, [SpanRequest(ids, []), SpanRequest(ids[::-1], [])], 100)
    held, _ = next(groups)
    causal_lm: Any = model.get_base_model()

    def logits(keep: list[int] | None) -> torch.Tensor:
        rows = held.copy_rows([(0, 3), (1, 2), (0, 5), (1, 4)], 2)
        last = torch.tensor([[21], [22], [23], [24]])
        with torch.no_grad():
            causal_lm(input_ids=last, use_cache=True, **rows.inputs(0, 1))
            if keep is not None:
                rows.keep(torch.tensor(keep))
                last = last[keep]
            return causal_lm(input_ids=last + 1, use_cache=True, **rows.inputs(1, 1)).logits[:, -1]

    assert torch.allclose(logits([3, 1]), logits(None)[[3, 1]], atol=1e-5)
    assert next(groups, None) is None and not held._batches, "the last group is freed as the others are"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(1, 1000))
def test_shards_take_all_dialogues_and_no_more_than_fill_them(lengths, budget):
    import numpy as np

    left, sizes = np.asarray(lengths), []
    while len(left):
        size = dialogues_of_shard(left, budget)
        assert size >= min(32, len(left)) and (size <= 32 or left[:size].sum() <= 4 * budget)
        sizes.append(size)
        left = left[size:]
    assert sum(sizes) == len(lengths)
