"""The likelihood of given replies: of references (perplexity) and of candidate replies (hits@1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kestrel.errors import ProofError
from kestrel.model.budget import Budget, Given
from kestrel.model.loss import NOT_FINITE, collate, token_nll
from kestrel.prompt.prompt import IGNORED


@dataclass(frozen=True)
class SpanRequest:
    """A token sequence and the spans in it to score, in order and without overlap."""

    input_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]


def collate_requests(requests: Sequence[SpanRequest]) -> dict[str, torch.Tensor]:
    """The batch that `loss.collate` makes, with the spans as supervised tokens."""
    rows = []
    for request in requests:
        labels = [IGNORED] * len(request.input_ids)
        for start, end in request.spans:
            labels[start:end] = request.input_ids[start:end]
        rows.append({"input_ids": request.input_ids, "labels": labels})
    return collate(rows, pad_id=0)


def sums_by_span(requests: Sequence[SpanRequest], nll: torch.Tensor | None) -> list[list[tuple[float, int]]]:
    """Sums the likelihoods of a batch's supervised tokens over each span.

    Args:
        requests: of the batch, as given to `collate_requests`.
        nll: float32 (supervised tokens,), row by row; None where there are none.

    Returns:
        For each request, (sum in nats, tokens) of each span.

    Raises:
        ProofError: a likelihood is not finite.
    """
    values = np.zeros(0) if nll is None else nll.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ProofError(NOT_FINITE)
    results: list[list[tuple[float, int]]] = []
    first = 0
    for request in requests:
        results.append([])
        for start, end in request.spans:
            results[-1].append((float(values[first : first + end - start].sum()), end - start))
            first += end - start
    return results


@torch.no_grad()
def span_nll(model: torch.nn.Module, requests: Sequence[SpanRequest], budget: Given) -> list[list[tuple[float, int]]]:
    """Negative log-likelihood of each span given all tokens before it; one forward pass scores all spans of a request.

    Args:
        model: prepared by `loss.attach_token_nll`; it is left in evaluation mode.
        requests: what to score.
        budget: of a batch.

    Returns:
        For each request, in order, (sum in nats, tokens) of each span.

    Raises:
        ProofError: a likelihood is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    results: list[list[tuple[float, int]]] = [[] for _ in requests]
    allowed = Budget.of(model, budget)

    def scores_of(positions: Sequence[int]) -> list[list[tuple[float, int]]]:
        chosen = [requests[position] for position in positions]
        batch = {name: tensor.to(device) for name, tensor in collate_requests(chosen).items()}
        return sums_by_span(chosen, token_nll(model, batch))

    for positions, scores in allowed.passes([len(request.input_ids) for request in requests], scores_of):
        for position, of_spans in zip(positions, scores, strict=True):
            results[position] = of_spans
    return results
