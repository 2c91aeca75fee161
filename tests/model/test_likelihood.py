"""Likelihoods equal sums of log-softmax by hand, and do not depend on what they are scored with."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from make_models import make_model

import generate
from kestrel.adapter.lora import load_adapter
from kestrel.config.resolve import resolve
from kestrel.data.dataset import dialogue_of, load_split
from kestrel.errors import ProofError
from kestrel.model.base import load_base
from kestrel.model.likelihood import SpanRequest, span_nll
from kestrel.model.loss import attach_token_nll
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made = make_model()
    attach_token_nll(made)
    return made.eval()


def by_hand(model: torch.nn.Module, ids: list[int], start: int, end: int) -> float:
    """Minus the log-probabilities of tokens start to end, one forward pass for each token, in double precision."""
    total = 0.0
    with torch.no_grad():
        for position in range(start, end):
            logits = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1].double()
            total -= (logits - logits.logsumexp(0))[ids[position]].item()
    return total


@st.composite
def sequences(draw: st.DrawFn) -> SpanRequest:
    ids = draw(st.lists(st.integers(0, 380), min_size=4, max_size=40))
    borders = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=6)))
    return SpanRequest(ids, list(zip(borders[::2], borders[1::2], strict=False)))


@given(st.lists(sequences(), min_size=1, max_size=5), st.integers(1, 200))
@settings(max_examples=15, deadline=None)
def test_equals_log_softmax_by_hand_in_any_batch(model, scored, budget):
    results = span_nll(model, scored, budget)
    assert [len(spans) for spans in results] == [len(sequence.spans) for sequence in scored]
    for sequence, spans in zip(scored, results, strict=True):
        for (start, end), (nll, tokens) in zip(sequence.spans, spans, strict=True):
            assert tokens == end - start
            assert nll == pytest.approx(by_hand(model, list(sequence.input_ids), start, end), rel=1e-4, abs=1e-4)


def test_nothing_to_score(model):
    assert span_nll(model, [], 10) == []
    assert span_nll(model, [SpanRequest([20, 21], [])], 10) == [[]]


def test_a_likelihood_that_is_not_finite_is_refused():
    broken = make_model()
    attach_token_nll(broken)
    broken.transformer.ln_f.weight.data[3] = float("inf")
    with pytest.raises(ProofError, match="not finite"):
        span_nll(broken, [SpanRequest([20, 21, 22], [(1, 3)])], 10)


def test_generations_file_holds_the_references_and_candidates_likelihoods(trained, tmp_path):
    """Every number of the file computed again from its text: prompt, reference and candidates are rendered again."""
    arguments = trained.copy_to(tmp_path / "run")
    assert generate.main([*arguments, "--generation.candidates", "true", "--generation.systems", "adapter"]) == 0
    chosen, _ = resolve(str(trained.config), {}, [])
    model = load_adapter(load_base(chosen)[0], trained.run / "adapter").eval()
    prompt = Prompt(load_tokenizer(chosen.model), "plain", 160)
    dialogues = {row["dialogue_id"]: dialogue_of(row) for row in load_split(trained.run / "dataset", "test", "")}
    lines = (tmp_path / "run" / "generations" / "test.adapter.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines[:5]):
        context = prompt.context(dialogues[row["dialogue_id"]], row["turn"])
        replies = [row["reference"], *dialogues[row["dialogue_id"]].candidates[row["turn"] // 2]]
        recorded = [[row["reference_nll"], row["reference_tokens"]], *row["candidate_nll"]]
        for text, (nll, tokens) in zip(replies, recorded, strict=True):
            ids = [*context, *prompt.reply_ids(text)]
            assert tokens == len(ids) - len(context)
            assert nll == pytest.approx(by_hand(model, ids, len(context), len(ids)), rel=1e-4)
