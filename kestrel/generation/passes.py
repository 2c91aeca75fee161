"""The passes of answering: over whole sequences, and over what continues them. By Kestrel's layers where they know the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from kestrel.generation.prefix_batch import KeysAndValues, PrefixBatch
from kestrel.model.fast_layers import FastBackbone
from kestrel.model.kernels import cards
from kestrel.model.kernels.attention import attend
from kestrel.model.likelihood import SpanRequest, collate_requests
from kestrel.model.loss import causal_lm_of, fast_layers_of, logits_of_hidden, nll_of_hidden
from kestrel.model.projection import Repeats

_FEW_ROWS = 32


def whole_pass(model: torch.nn.Module, sequences: Sequence[SpanRequest]) -> tuple[KeysAndValues, torch.Tensor | None]:
    """Keys and values of whole sequences, and what `_pass` returns; by Kestrel's layers where they know the model."""
    if (fast := fast_layers_of(model)) is not None:
        kept: KeysAndValues = []

        def keeping(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
            # As copies: they are views of a buffer that also holds the queries.
            kept.append((_copied(key), _copied(value)))
            return attend(query, key, value, window)

        batch = _batch(model, sequences)
        repeats = Repeats(batch["first"], batch["which"])
        hidden = fast.hidden_states(batch["input_ids"], batch["predicting"], repeats, attending=keeping)
        return kept, _nll(model, batch, hidden)
    cache = DynamicCache()  # without the model's windows, which are not exceeded
    nll = _pass(model, sequences, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers], nll


def continuing_pass(
    model: torch.nn.Module, sequences: Sequence[SpanRequest], prefixes: PrefixBatch, length: int
) -> torch.Tensor | None:
    """`_pass` of sequences of at most `length` tokens, each after its prefix; by Kestrel's layers where they know the model."""
    if (fast := fast_layers_of(model)) is None:
        return _pass(model, sequences, **prefixes.inputs(0, length))
    batch = _batch(model, sequences)
    return _nll(model, batch, _continued(fast, prefixes, batch["input_ids"], 0, batch["predicting"]))


def next_logits(model: torch.nn.Module, prefixes: PrefixBatch, tokens: torch.Tensor, done: int) -> torch.Tensor:
    """(rows, vocabulary) after one more token of each row, int64 (rows,), which has `done` others after its prefix.

    Of few rows bitsandbytes' fused 4-bit products are faster than making the weights dense for them.
    """
    causal_lm: Any = causal_lm_of(model)
    fast = fast_layers_of(model)
    if fast is not None and (len(tokens) > _FEW_ROWS or (fast.is_dense() and not cards.is_before_ampere())):
        hidden = _continued(fast, prefixes, tokens[:, None], done, torch.arange(len(tokens), device=tokens.device))
        return logits_of_hidden(causal_lm, hidden)
    logits: torch.Tensor = causal_lm(input_ids=tokens[:, None], use_cache=True, **prefixes.inputs(done, 1)).logits
    return logits[:, -1]


def _continued(
    fast: FastBackbone, prefixes: PrefixBatch, ids: torch.Tensor, done: int, wanted: torch.Tensor
) -> torch.Tensor:
    """Hidden states (wanted, hidden size) of tokens (rows, count) after prefixes; their rows are computed as one."""
    count = ids.shape[1]
    positions, attending = prefixes.positions(done, count).flatten(), prefixes.attending(done, count)
    return fast.hidden_states(ids.flatten()[None], wanted, positions=positions[None], attending=attending)


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _batch(model: torch.nn.Module, sequences: Sequence[SpanRequest]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in collate_requests(sequences).items()}


def _pass(model: torch.nn.Module, sequences: Sequence[SpanRequest], **inputs: Any) -> torch.Tensor | None:
    """One pass of transformers' layers, which extends the cache in `inputs`.

    Returns:
        float32 (tokens in spans,), the negative log-likelihood of each, row by row; None where there are no spans.
    """
    causal_lm = causal_lm_of(model)
    batch = _batch(model, sequences)
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    hidden = backbone(input_ids=batch["input_ids"], use_cache=True, **inputs).last_hidden_state
    return _nll(model, batch, hidden.flatten(0, 1).index_select(0, batch["predicting"]))


def _nll(model: torch.nn.Module, batch: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor | None:
    """What `_pass` returns, from the last hidden states (tokens in spans, hidden size)."""
    predicting = batch["predicting"]
    if not len(predicting):
        return None
    return nll_of_hidden(causal_lm_of(model), states, batch["labels"].flatten()[predicting + 1])
