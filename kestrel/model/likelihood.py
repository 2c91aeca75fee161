"""How likely given replies are: of the references (perplexity) and of candidate replies (hits@1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kestrel.batching import batches_within
from kestrel.errors import ProofError
from kestrel.model.loss import NOT_FINITE, collate, token_nll
from kestrel.prompt.prompt import IGNORED


@dataclass(frozen=True)
class SpanRequest:
    """A token sequence and the spans in it whose likelihood is wanted, in order and apart from each other."""

    input_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]


def with_labels(sequences: Sequence[SpanRequest]) -> dict[str, torch.Tensor]:
    """The sequences as a right-padded batch, as of `loss.collate`, whose supervised tokens are the spans."""
    rows = []
    for sequence in sequences:
        labels = [IGNORED] * len(sequence.input_ids)
        for start, end in sequence.spans:
            labels[start:end] = sequence.input_ids[start:end]
        rows.append({"input_ids": sequence.input_ids, "labels": labels})
    return collate(rows, pad_id=0)


def spans_of(sequences: Sequence[SpanRequest], nll: torch.Tensor | None) -> list[list[tuple[float, int]]]:
    """Sums up the likelihoods of a batch's supervised tokens.

    Args:
        sequences: of the batch.
        nll: float32 (supervised tokens,), row by row; None where there are none.

    Returns:
        For each sequence, (sum in nats, tokens) of each span.

    Raises:
        ProofError: a likelihood is not finite.
    """
    values = np.zeros(0) if nll is None else nll.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ProofError(NOT_FINITE)
    results: list[list[tuple[float, int]]] = []
    first = 0
    for sequence in sequences:
        results.append([])
        for start, end in sequence.spans:
            results[-1].append((float(values[first : first + end - start].sum()), end - start))
            first += end - start
    return results


@torch.no_grad()
def span_nll(
    model: torch.nn.Module, sequences: Sequence[SpanRequest], tokens_per_step: int
) -> list[list[tuple[float, int]]]:
    """Negative log-likelihood of each span given all tokens before it.

    One forward pass scores every span of a sequence, so a dialogue's references cost one pass together.

    Args:
        model: prepared by `loss.attach_token_nll`; it is left in evaluation mode.
        sequences: what to score.
        tokens_per_step: most tokens of a batch, padding included.

    Returns:
        For each sequence, in order, (sum in nats, tokens) of each span.

    Raises:
        ProofError: a likelihood is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    results: list[list[tuple[float, int]]] = [[] for _ in sequences]
    lengths = np.asarray([len(sequence.input_ids) for sequence in sequences], dtype=np.int64)
    for positions in batches_within(lengths, tokens_per_step) if len(sequences) else ():
        chosen = [sequences[position] for position in positions]
        batch = {name: tensor.to(device) for name, tensor in with_labels(chosen).items()}
        for position, scores in zip(positions, spans_of(chosen, token_nll(model, batch)), strict=True):
            results[position] = scores
    return results
