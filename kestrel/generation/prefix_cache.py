"""Keys and values of token sequences, computed once and shared by everything that begins with the same tokens.

Every prompt of a dialogue is a prefix of the dialogue's sequence. One pass over the sequence gives the keys and values
of all its prompts, and with them how likely all its references are. What follows a prompt, an answer or a candidate, is
computed behind a copy of the prompt's share:

    columns     0 ........ n-1 | n .......... width-1 | width ...
                the prefix       masked: others' only   what follows

A prefix of n tokens keeps its positions, what follows has the positions n, n+1, ..., and the mask hides what lies
between. So copying is an indexing of rows, and all rows grow at the same column.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kestrel.batching import batches_within
from kestrel.model.likelihood import SpanRequest, spans_of, with_labels
from kestrel.model.loss import causal_lm_of, nll_of_hidden

# What a position of a pass without gradient takes at most, in hidden states: the layer's input, norm, fused projection,
# attention, and an MLP of four times the width before and after its activation, some of them in float32 for LoRA.
_HIDDEN_STATES_A_POSITION = 24


def is_shareable(model: torch.nn.Module) -> bool:
    """Whether this architecture can go on from a prefix computed elsewhere.

    That needs attention over all that went before (no sliding window, no recurrent state), positions that are told and
    not counted in columns, and the same rotation of a position in long sequences and short ones. Falcon with rotary
    positions or alibi, Llama, Qwen, GPT-NeoX and GPT-2 are of this kind; Bloom, MPT, Mistral with its window, hybrids
    with linear attention, and dynamic or long RoPE are not. Of code that comes with a model nothing is known.
    """
    causal_lm = causal_lm_of(model)
    taken = inspect.signature(causal_lm.forward).parameters
    rotary = getattr(causal_lm.config, "rope_parameters", None) or {}
    layers = DynamicCache(config=causal_lm.config).layers
    return (
        type(causal_lm).__module__.startswith("transformers.")
        and {"position_ids", "past_key_values"} <= taken.keys()
        and rotary.get("rope_type") not in ("dynamic", "longrope")
        and all(type(layer) is DynamicLayer for layer in layers)
    )


def activation_bytes(model: torch.nn.Module) -> int:
    """Upper bound of what a position of a pass without gradient takes while its layer is computed."""
    causal_lm = causal_lm_of(model)
    width = int(causal_lm.config.get_text_config().hidden_size)
    return _HIDDEN_STATES_A_POSITION * width * causal_lm.dtype.itemsize


class _Growing(DynamicLayer):
    """A layer's keys and values in memory that is already there for what follows, so that growing copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int):
        super().__init__()
        self._memory, self._filled = (keys, values), filled
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (memory[:, :, : self._filled] for memory in self._memory)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start, self._filled = self._filled, self._filled + key_states.shape[-2]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start : self._filled] = states
        self._show()
        return self.keys, self.values

    def keep(self, rows: torch.Tensor) -> None:
        keys, values = (memory[rows] for memory in self._memory)
        self._memory = (keys, values)
        self._show()


class PrefixBatch:
    """Rows of prefixes, side by side, with room for what follows them.

    Attributes:
        cache: for the model's `past_key_values`; it grows with each pass.
        width: columns of the prefixes.
        lengths: int64 (rows,), tokens of each prefix.
    """

    def __init__(self, layers: list[_Growing], lengths: torch.Tensor, width: int, room: int):
        self.cache = DynamicCache()
        self.cache.layers = layers
        self.width, self.lengths = width, lengths
        columns = torch.arange(width + room, device=lengths.device)
        self._mask = ((columns < lengths[:, None]) | (columns >= width)).long()

    def inputs(self, done: int, count: int) -> dict[str, Any]:
        """What the model needs beside the ids for tokens `done` to `done + count` after each prefix."""
        columns = torch.arange(done, done + count, device=self.lengths.device)
        return {
            "past_key_values": self.cache,
            "attention_mask": self._mask[:, : self.width + done + count],
            "position_ids": self.lengths[:, None] + columns,
        }

    def keep(self, rows: torch.Tensor) -> None:
        """Leaves all other rows out from now on."""
        for layer in self.cache.layers:
            layer.keep(rows)
        self.lengths, self._mask = self.lengths[rows], self._mask[rows]


class Prefixes:
    """Keys and values of some sequences.

    Attributes:
        bytes_a_token: that keys and values of one token take, all layers together.
        nbytes: of all that is held.
    """

    def __init__(self) -> None:
        self._batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._places: dict[int, tuple[int, int]] = {}  # of a sequence: its batch and its row there
        self.bytes_a_token = self.nbytes = 0

    def add(self, sequences: Sequence[int], cache: DynamicCache) -> None:
        """Takes over a cache whose rows are the given sequences, padded on the right."""
        batch = [(layer.keys, layer.values) for layer in cache.layers]
        self._places |= {sequence: (len(self._batches), row) for row, sequence in enumerate(sequences)}
        self._batches.append(batch)
        nbytes = sum(tensor.nbytes for pair in batch for tensor in pair)
        self.nbytes += nbytes
        self.bytes_a_token = nbytes // (batch[0][0].shape[0] * batch[0][0].shape[2])

    def holds(self, sequence: int) -> bool:
        return sequence in self._places

    def release(self) -> None:
        """Gives the memory back, whoever still knows of this group."""
        self._batches.clear()

    def behind(self, prefixes: Sequence[tuple[int, int]], room: int) -> PrefixBatch:
        """Copies prefixes side by side.

        Args:
            prefixes: of each row, the sequence and how many of its tokens.
            room: most tokens that will follow.
        """
        width = max(length for _, length in prefixes)
        places = np.asarray([self._places[sequence] for sequence, _ in prefixes])
        device = self._batches[0][0][0].device
        chosen: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # batch, rows to fill, its rows to fill them from
        for number in np.unique(places[:, 0]):
            rows = np.flatnonzero(places[:, 0] == number)
            sources = torch.from_numpy(places[rows, 1]).to(device)
            chosen.append((int(number), torch.from_numpy(rows).to(device), sources))

        def copied(layer: int, which: int) -> torch.Tensor:
            _, heads, _, size = (example := self._batches[0][layer][which]).shape
            # Zeros, for what is masked must still be a number.
            memory = example.new_zeros(len(prefixes), heads, width + room, size)
            for number, rows, sources in chosen:
                source = self._batches[number][layer][which]
                memory[rows, :, : min(width, source.shape[2])] = source[sources, :, :width]
            return memory

        layers = [_Growing(copied(layer, 0), copied(layer, 1), width) for layer in range(len(self._batches[0]))]
        return PrefixBatch(layers, torch.tensor([length for _, length in prefixes], device=device), width, room)


@torch.no_grad()
def computed(
    model: torch.nn.Module, sequences: Sequence[SpanRequest], tokens_per_step: int
) -> Iterator[tuple[Prefixes, dict[int, list[tuple[float, int]]]]]:
    """Passes over all sequences, the longest first, and hands them over in groups that fit into memory together.

    Args:
        model: that `is_shareable`; it is left in evaluation mode.
        sequences: with the spans whose likelihood is wanted on the way, if any.
        tokens_per_step: most tokens of one pass, padding included.

    Yields:
        The keys and values of a group, which are there until the next one is asked for, and for each sequence in it, by
        its index, (sum in nats, tokens) of each span.

    Raises:
        ProofError: a likelihood is not finite.
    """
    model.eval()
    held = Prefixes()
    scores: dict[int, list[tuple[float, int]]] = {}
    lengths = np.asarray([len(sequence.input_ids) for sequence in sequences], dtype=np.int64)
    for positions in batches_within(lengths, tokens_per_step):
        if held.nbytes and 2 * held.nbytes > memory_for_rows(model, held, tokens_per_step):
            yield held, scores
            held.release()
            held, scores = Prefixes(), {}
        chosen = [sequences[position] for position in positions]
        cache = DynamicCache(config=causal_lm_of(model).config)
        nll = _pass(model, chosen, past_key_values=cache)
        scores |= dict(zip(positions.tolist(), spans_of(chosen, nll), strict=True))
        held.add(positions.tolist(), cache)
    if held.nbytes:
        yield held, scores


def memory_for_rows(model: torch.nn.Module, held: Prefixes, tokens_per_step: int) -> int:
    """Bytes that what follows the prefixes may take: as much as a pass over tokens_per_step tokens, or their cache."""
    return tokens_per_step * max(activation_bytes(model), held.bytes_a_token)


@torch.no_grad()
def continuation_nll(
    model: torch.nn.Module,
    held: Prefixes,
    wanted: Mapping[int, tuple[int, Sequence[int], Sequence[Sequence[int]]]],
    tokens_per_step: int,
) -> dict[int, list[tuple[float, int]]]:
    """Negative log-likelihood of other continuations of prefixes, of which only their own tokens are computed.

    Args:
        model: as for `computed`.
        held: from `computed`.
        wanted: by any name, the sequence, the context that begins it, and the continuations' token ids.
        tokens_per_step: as for `computed`.

    Returns:
        For each name, (sum in nats, tokens) of each continuation.

    Raises:
        ProofError: a likelihood is not finite.
    """
    rows = [(name, number) for name, (_, _, continuations) in wanted.items() for number in range(len(continuations))]
    rows.sort(key=lambda row: -len(wanted[row[0]][1]))
    longest = max((len(c) for _, _, continuations in wanted.values() for c in continuations), default=0) + 1
    results: dict[int, list[tuple[float, int]]] = {name: [(0.0, 0)] * len(of[2]) for name, of in wanted.items()}
    first = 0
    while first < len(rows):
        width = len(wanted[rows[first][0]][1]) + longest
        cost = width * held.bytes_a_token + longest * activation_bytes(model)
        count = max(1, memory_for_rows(model, held, tokens_per_step) // cost)
        chosen, scored = rows[first : first + count], []
        for name, number in chosen:
            _, context, continuations = wanted[name]
            # The context's last token comes again, as it predicts the continuation's first.
            ids = [context[-1], *continuations[number]]
            scored.append(SpanRequest(ids, [(1, len(ids))]))
        length = max(len(sequence.input_ids) for sequence in scored)
        behind = held.behind([(wanted[name][0], len(wanted[name][1]) - 1) for name, _ in chosen], length)
        scores = spans_of(scored, _pass(model, scored, **behind.inputs(0, length)))
        del behind  # before the next ones are copied
        for (name, number), (pair,) in zip(chosen, scores, strict=True):
            results[name][number] = pair
        first += len(chosen)
    return results


def _pass(model: torch.nn.Module, sequences: Sequence[SpanRequest], **inputs: Any) -> torch.Tensor | None:
    """One pass that adds to the cache among the inputs.

    Returns:
        float32 (tokens in spans,), the negative log-likelihood of each, row by row; None where there are no spans.
    """
    causal_lm = causal_lm_of(model)
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in with_labels(sequences).items()}
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    hidden = backbone(input_ids=batch["input_ids"], use_cache=True, **inputs).last_hidden_state
    predicting = batch["predicting"]
    if not len(predicting):
        return None
    targets = batch["labels"].flatten()[predicting + 1]
    states = hidden.flatten(0, 1).index_select(0, predicting)
    return nll_of_hidden(causal_lm, states, targets)
