"""Keys and values of token sequences, computed once and shared by all that begins with the same tokens.

Every prompt of a dialogue is a prefix of the dialogue's sequence. One pass over the sequence gives the keys and values
of all its prompts, and the likelihood of all its references. What continues a prompt, an answer or a candidate, is
computed after a copy of the prompt's keys and values (`prefix_batch.py`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kestrel.generation.passes import continuing_pass, whole_pass
from kestrel.generation.prefix_batch import KeysAndValues, PreallocatedLayer, PrefixBatch
from kestrel.model.architecture import describe
from kestrel.model.budget import Budget, Given
from kestrel.model.likelihood import SpanRequest, span_nll, sums_by_span
from kestrel.model.loss import causal_lm_of


def supports_prefixes(model: torch.nn.Module, longest: float = math.inf) -> bool:
    """Whether this architecture can continue a prefix that was computed in another batch.

    That needs attention over all earlier tokens (no recurrent state, and no sliding window that these sequences exceed),
    positions passed as an argument instead of counted in columns, and rotations that do not depend on the sequence's length.
    Falcon with rotary positions or alibi, Llama, Qwen, GPT-NeoX and GPT-2 have all three, and so have Mistral, Phi-3 and
    Gemma 3 within their windows; Bloom, MPT, hybrids with linear attention, and dynamic or long RoPE do not. Code that comes
    with a model is not trusted to.

    Args:
        longest: tokens of the longest sequence, with all that is to continue it.
    """
    causal_lm = causal_lm_of(model)
    parameters = inspect.signature(causal_lm.forward).parameters
    rotary = getattr(causal_lm.config, "rope_parameters", None) or {}
    rotaries = [rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))]  # one for each kind of layer
    layers = DynamicCache(config=causal_lm.config).layers
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    # Of a Mistral whose configuration has layer types, which its layers do not read, the cache knows no windows.
    known = describe(getattr(causal_lm, causal_lm.base_model_prefix))
    windows += [window for window in known.windows if window is not None] if known is not None else []
    return (
        type(causal_lm).__module__.startswith("transformers.")
        and {"position_ids", "past_key_values"} <= parameters.keys()
        and not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in rotaries)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        and longest <= min(windows, default=math.inf)
    )


class Prefixes:
    """Keys and values of some sequences; `nbytes` of them, and `bytes_per_token`, all layers together."""

    def __init__(self) -> None:
        self._batches: list[KeysAndValues] = []
        self._places: dict[int, tuple[int, int]] = {}  # batch, and row in it, of each sequence
        self.bytes_per_token = self.nbytes = 0

    def add(self, sequences: Sequence[int], batch: KeysAndValues) -> None:
        """Adds keys and values whose rows are the given sequences, padded on the right."""
        self._places |= {sequence: (len(self._batches), row) for row, sequence in enumerate(sequences)}
        self._batches.append(batch)
        nbytes = sum(tensor.nbytes for pair in batch for tensor in pair)
        self.nbytes += nbytes
        self.bytes_per_token = nbytes // (batch[0][0].shape[0] * batch[0][0].shape[2])

    def holds(self, sequence: int) -> bool:
        return sequence in self._places

    def release(self) -> None:
        """Frees the memory, whoever still refers to this group."""
        self._batches.clear()

    def copy_rows(self, prefixes: Sequence[tuple[int, int]], space: int) -> PrefixBatch:
        """Copies prefixes, each given by its sequence and its tokens, side by side, with space for more tokens."""
        width = max(length for _, length in prefixes)
        places = np.asarray([self._places[sequence] for sequence, _ in prefixes])
        device = self._batches[0][0][0].device
        chosen = []  # batch, rows to fill, and which of its rows fill them
        for number in np.unique(places[:, 0]).tolist():
            rows = np.flatnonzero(places[:, 0] == number)
            chosen.append((number, torch.from_numpy(rows).to(device), torch.from_numpy(places[rows, 1]).to(device)))

        def copied(layer: int, which: int) -> torch.Tensor:
            _, heads, _, size = (example := self._batches[0][layer][which]).shape
            # Zeros: what is masked must still be a finite number.
            memory = example.new_zeros(len(prefixes), heads, width + space, size)
            for number, rows, sources in chosen:
                source = self._batches[number][layer][which]
                memory[rows, :, : min(width, source.shape[2])] = source[sources, :, :width]
            return memory

        layers = [PreallocatedLayer(copied(n, 0), copied(n, 1), width) for n in range(len(self._batches[0]))]
        return PrefixBatch(layers, torch.tensor([length for _, length in prefixes], device=device), width, space)


@torch.no_grad()
def compute_prefixes(
    model: torch.nn.Module, sequences: Sequence[SpanRequest], budget: Given
) -> Iterator[tuple[Prefixes, dict[int, list[tuple[float, int]]]]]:
    """Computes all sequences, the longest first, in groups that fit into memory together.

    Args:
        model: one that `supports_prefixes`; it is left in evaluation mode.
        budget: of one pass, and of what is to continue the sequences.

    Yields:
        Keys and values of a group, freed when the next group is requested, and for each sequence in it, by its index,
        (sum in nats, tokens) of each span.

    Raises:
        ProofError: a likelihood is not finite.
    """
    model.eval()
    prefixes = Prefixes()
    scores: dict[int, list[tuple[float, int]]] = {}
    allowed = Budget.of(model, budget)

    def run(positions: Sequence[int]) -> tuple[KeysAndValues, list[list[tuple[float, int]]]]:
        chosen = [sequences[position] for position in positions]
        made, nll = whole_pass(model, chosen)
        return made, sums_by_span(chosen, nll)

    for positions, (made, of_spans) in allowed.passes([len(sequence.input_ids) for sequence in sequences], run):
        scores |= dict(zip(positions, of_spans, strict=True))
        prefixes.add(positions, made)
        del made
        if 2 * prefixes.nbytes > allowed.continuation_memory(prefixes.bytes_per_token):
            yield prefixes, scores
            prefixes.release()
            prefixes, scores = Prefixes(), {}
    if prefixes.nbytes:
        yield prefixes, scores
        prefixes.release()


class Continuation(NamedTuple):
    """Token ids that may follow a context, and the index of the computed sequence that begins with this context."""

    sequence: int
    context: Sequence[int]
    ids: Sequence[int]


@torch.no_grad()
def continuation_nll(
    model: torch.nn.Module, prefixes: Prefixes | None, continuations: Sequence[Continuation], budget: Given
) -> list[tuple[float, int]]:
    """Negative log-likelihood of continuations; only their own tokens are computed.

    Args:
        model, budget: as for `compute_prefixes`.
        prefixes: None where the model cannot share them; then each continuation is computed with its context.

    Returns:
        (sum in nats, tokens) of each continuation.

    Raises:
        ProofError: a likelihood is not finite.
    """
    if prefixes is None:
        whole = [
            SpanRequest([*c.context, *c.ids], [(len(c.context), len(c.context) + len(c.ids))]) for c in continuations
        ]
        return [pair for (pair,) in span_nll(model, whole, budget)]
    allowed, held = Budget.of(model, budget), prefixes
    longest = max((len(c.ids) for c in continuations), default=0) + 1
    results = [(0.0, 0)] * len(continuations)

    def fitting(left: Sequence[int]) -> int:
        width = len(continuations[left[0]].context) + longest
        cost = width * held.bytes_per_token + longest * allowed.bytes_per_position
        return allowed.continuation_memory(held.bytes_per_token) // cost

    def run(indices: Sequence[int]) -> list[list[tuple[float, int]]]:
        chosen = [continuations[index] for index in indices]
        # The context's last token is computed again: it predicts the continuation's first.
        scored = [SpanRequest([c.context[-1], *c.ids], [(1, len(c.ids) + 1)]) for c in chosen]
        length = max(len(request.input_ids) for request in scored)
        batch = held.copy_rows([(c.sequence, len(c.context) - 1) for c in chosen], length)
        return sums_by_span(scored, continuing_pass(model, scored, batch, length))

    order = sorted(range(len(continuations)), key=lambda index: -len(continuations[index].context))
    for indices, scores in allowed.in_batches(order, fitting, run):
        for index, (pair,) in zip(indices, scores, strict=True):
            results[index] = pair
    return results
