"""Kestrel's layers continue prefixes as transformers' do: token by token, and several tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from described_models import MODELS, SMALL, make_described

from kestrel.generation import passes
from kestrel.generation.passes import continuing_pass, next_logits, whole_pass
from kestrel.generation.prefix_batch import PrefixBatch
from kestrel.generation.prefix_cache import Prefixes, supports_prefixes
from kestrel.model.dense_weights import dense_weights
from kestrel.model.kernels import elementwise
from kestrel.model.likelihood import SpanRequest
from kestrel.model.loss import attach_token_nll, causal_lm_of, fast_layers_of

SEQUENCES = [list(range(12, 12 + length)) for length in (9, 4, 7)]
PREFIXES = [(0, 9), (2, 3), (1, 4), (2, 7)]  # sequence, and how many of its tokens
SHORT_WINDOWS = {"mistral, a window that is met", "mistral, with what it does not read", "gemma3_text"}
NEXT = [[31, 32, 33], [41, 42, 43], [51, 52, 53], [61, 62, 63]]


def prefixes_of(model: Any) -> PrefixBatch:
    """Of the prefixes, each without its last token."""
    keys_and_values, _ = whole_pass(model, [SpanRequest(ids, []) for ids in SEQUENCES])
    computed = Prefixes()
    computed.add(range(len(SEQUENCES)), keys_and_values)
    return computed.copy_rows([(sequence, length - 1) for sequence, length in PREFIXES], space=4)


@torch.no_grad()
def continued(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, tokens, vocabulary), token by token; and the likelihoods of the tokens at once."""
    fed = [[SEQUENCES[sequence][length - 1], *after] for (sequence, length), after in zip(PREFIXES, NEXT, strict=True)]
    rows, tokens = prefixes_of(model), torch.tensor(fed)
    logits = [next_logits(model, rows, tokens[:, done], done) for done in range(tokens.shape[1])]
    nll = continuing_pass(model, [SpanRequest(ids, [(1, len(ids))]) for ids in fed], prefixes_of(model), 4)
    assert nll is not None
    return torch.stack(logits, dim=1), nll


@pytest.mark.parametrize("name", MODELS)
def test_as_transformers_would_after_the_whole_context(name: str) -> None:
    model = make_described(name, torch.float32).eval()
    attach_token_nll(model)
    assert fast_layers_of(model) is not None
    if name in SHORT_WINDOWS:
        assert not supports_prefixes(model, 13)
        return
    found, nll = continued(model)
    for row, ((sequence, length), after) in enumerate(zip(PREFIXES, NEXT, strict=True)):
        context = torch.tensor([[*SEQUENCES[sequence][:length], *after]])
        with torch.no_grad():
            expected = causal_lm_of(model)(input_ids=context).logits[0, length - 1 :]
        assert (found[row] - expected).norm() < 1e-4 * expected.norm()
        likelihoods = torch.log_softmax(expected[:-1], dim=-1).gather(1, torch.tensor(after)[:, None])[:, 0]
        torch.testing.assert_close(nll[3 * row : 3 * row + 3], -likelihoods, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["falcon", "qwen2"])
def test_with_the_kernels_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setitem(SMALL, "intermediate_size", 128)  # as in test_fast_layers.py
    model = make_described(name, torch.float32, kind="nf4", r=16).eval()
    attach_token_nll(model)
    expected, of_tokens = continued(model)
    monkeypatch.setattr(elementwise, "place_of", lambda x: "triton")
    with dense_weights(model) as is_dense:
        found, nll = continued(model)
    assert is_dense and (found - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(nll, of_tokens, rtol=1e-4, atol=1e-4)


def test_few_rows_take_the_fused_products_of_weights_in_4_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the weights are dense anyway; many rows are multiplied by weights that are made dense for them."""
    model = make_described("qwen2", torch.float32, kind="nf4").eval()
    attach_token_nll(model)
    ours: list[int] = []
    own = passes._continued
    monkeypatch.setattr(passes, "_continued", lambda *given: (ours.append(1), own(*given))[1])
    with torch.no_grad():
        next_logits(model, prefixes_of(model), torch.tensor([1, 2, 3, 4]), 0)
        assert not ours
        with dense_weights(model):
            next_logits(model, prefixes_of(model), torch.tensor([1, 2, 3, 4]), 0)
        assert len(ours) == 1
        monkeypatch.setattr(passes, "_FEW_ROWS", 3)
        next_logits(model, prefixes_of(model), torch.tensor([1, 2, 3, 4]), 0)
        assert len(ours) == 2
