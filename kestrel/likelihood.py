"""How likely given replies are: of the references (perplexity) and of candidate replies (hits@1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kestrel.batching import batches_within
from kestrel.errors import ProofError
from kestrel.loss import NOT_FINITE, collate, token_nll
from kestrel.prompt import IGNORED


@dataclass(frozen=True)
class Scored:
    """A token sequence and the spans in it whose likelihood is wanted, in order and apart from each other."""

    input_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]


@torch.no_grad()
def span_nll(
    model: torch.nn.Module, sequences: Sequence[Scored], tokens_per_step: int
) -> list[list[tuple[float, int]]]:
    """Negative log-likelihood of each span given all tokens before it.

    One forward pass scores every span of a sequence, so a dialogue's references cost one pass together.

    Args:
        model: prepared by `loss.install`; it is left in evaluation mode.
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
        rows = []
        for position in positions:
            sequence = sequences[position]
            labels = [IGNORED] * len(sequence.input_ids)
            for start, end in sequence.spans:
                labels[start:end] = sequence.input_ids[start:end]
            rows.append({"input_ids": sequence.input_ids, "labels": labels})
        batch = {name: tensor.to(device) for name, tensor in collate(rows, pad_id=0).items()}
        values = token_nll(model, batch).double().cpu()
        if not torch.isfinite(values).all():
            raise ProofError(NOT_FINITE)
        first = 0
        for position in positions:
            for start, end in sequences[position].spans:
                results[position].append((values[first : first + end - start].sum().item(), end - start))
                first += end - start
    return results
