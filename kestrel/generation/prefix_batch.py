"""Rows that continue a computed prefix, side by side, and the attention by which they do.

    columns     0 ........ n-1 | n .......... width-1 | width ...
                the prefix       masked: longer rows'   the continuation

A prefix of n tokens keeps its positions, its continuation has the positions n, n+1, ..., and the mask hides the columns
between them. So copying is an indexing of rows, and all rows grow at the same column.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kestrel.model.decoder_layer import Attending

# Of each layer, (rows, key/value heads, length, head size), with their positions, as transformers' caches hold them.
KeysAndValues: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values, in memory that has space for their continuation, so that growing copies nothing."""

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
    """Rows of prefixes, side by side, with space for their continuation.

    Attributes:
        width: columns of the longest prefix.
        lengths: int64 (rows,), tokens of each prefix.
    """

    def __init__(self, layers: list[PreallocatedLayer], lengths: torch.Tensor, width: int, space: int):
        self.cache = DynamicCache()
        self.cache.layers = layers
        self.width, self.lengths = width, lengths
        columns = torch.arange(width + space, device=lengths.device)
        self._mask = ((columns < lengths[:, None]) | (columns >= width)).long()

    def inputs(self, done: int, count: int) -> dict[str, Any]:
        """Arguments of the model, besides input_ids, for tokens `done` to `done + count` after each prefix."""
        return {
            "past_key_values": self.cache,
            "attention_mask": self._mask[:, : self.width + done + count],
            "position_ids": self.positions(done, count),
        }

    def _offsets(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.lengths.device)

    def positions(self, done: int, count: int) -> torch.Tensor:
        """int64 (rows, count), of tokens `done` to `done + count` after each prefix."""
        return self.lengths[:, None] + done + self._offsets(count)

    def attending(self, done: int, count: int) -> Attending:
        """Attention of the fast layers for these tokens, of all rows one after the other: (1, heads, rows * count, size)."""
        layers, rows, columns = iter(self.cache.layers), len(self.lengths), self.width + done + count
        later = torch.arange(columns, device=self.lengths.device) > self.width + done + self._offsets(count)[:, None]
        mask = (self._mask[:, None, :columns].bool() & ~later)[:, None]  # (rows, 1, count, columns)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
            query, *made = (states[0].unflatten(1, (rows, count)).transpose(0, 1) for states in (query, key, value))
            keys, values = next(layers).update(*made)
            # The queries that share a key/value head are rows of one matrix, and keys and values are not repeated for each.
            each = query.shape[1] // keys.shape[1]
            packed = query.unflatten(1, (-1, each)).flatten(2, 3)
            seen = mask if count == 1 else mask.repeat(1, 1, each, 1)
            out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=seen)
            return out.unflatten(2, (each, count)).flatten(1, 2).transpose(0, 1).flatten(1, 2)[None]

        return attend

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all other rows."""
        for layer in self.cache.layers:
            layer.keep(rows)
        self.lengths, self._mask = self.lengths[rows], self._mask[rows]
