"""Attention of the fast layers: Falcon's and grouped heads', on a GPU by fused kernels, on a CPU by blocks of queries.

Falcon has many query heads and one key/value head, and transformers passes both to `scaled_dot_product_attention`
unchanged. torch's fused kernels need equal numbers of heads, so it falls back to plain matrix products that keep every
attention score in memory: on one H200 a training step is 1.4 times slower and needs twice the memory. Expanding the one
head as a view, without a copy, lets the fused kernels run. The result is the same.

Training has its own kernels (`attention_gpu.py`), in which all heads share the keys. torch's flash kernels take 1.7 times
as long for dialogues on an H200; cuDNN's are as fast as ours but need 100 ms to plan for each new length, and nearly every
pass has one.

For torch 2.11 to 2.13 and transformers 5.17 to 5.23; `test_stock_falcon_misses_the_fused_kernel` fails when this is no
longer needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from kestrel.model.kernels import cards
from kestrel.model.kernels.elementwise import place_of

_BLOCK = 64  # queries per block
_LONGEST_IN_BLOCKS = 1024  # tokens; longer rows would keep too many attention weights

_stock = F.scaled_dot_product_attention


def _with_repeated_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch's function, with a single key/value head shared by all query heads.

    With one query per head, as in generation, the heads become the queries of one head, so the keys are read once.

    Args:
        query: (batch, heads, queries, head size).
        key, value: (batch, heads or 1, keys, head size).
    """
    if key.dim() == 4 and key.shape[1] == 1 and query.shape[1] > 1:
        if query.shape[2] == 1 and not args and not kwargs.get("is_causal"):
            mask = kwargs.pop("attn_mask", None)
            mask = mask.transpose(1, 2) if mask is not None and mask.dim() == 4 else mask
            return _stock(query.transpose(1, 2), key, value, attn_mask=mask, **kwargs).transpose(1, 2)
        key, value = (t.expand(-1, query.shape[1], -1, -1) for t in (key, value))
    return _stock(query, key, value, *args, **kwargs)


def use_fused_kernels(model_type: str) -> None:
    """Selects the fused attention kernels that suit dialogues, for the rest of the process."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A card before Ampere has no flash attention, and one that KESTREL_CARD limits to it must not use it. CPUs, for which
    # the switch holds too, do.
    if torch.cuda.is_available() and cards.is_before_ampere():
        torch.backends.cuda.enable_flash_sdp(False)
    if model_type == "falcon":
        F.scaled_dot_product_attention = _with_repeated_heads


class OnShapes:
    """What the functions of `attention_gpu.py` allocate, on the meta device: `planning/memory.py` counts it."""

    HEADS_PER_BLOCK = 8  # of `attention_gpu._OF_KEYS`

    @staticmethod
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        return out, out.new_empty(out.shape[:3], dtype=torch.float32)

    @classmethod
    def attend_backward(
        cls, grad: torch.Tensor, query: Any, key: Any, value: Any, out: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = -(-query.shape[1] // cls.HEADS_PER_BLOCK)
        of_query, deltas = torch.empty_like(out), torch.empty_like(sums)
        partial = query.new_empty(groups, *out.shape[:2], 2, out.shape[3], dtype=torch.float32)
        del deltas
        return of_query, partial.sum(0).to(query.dtype)


def kernels_for(query: torch.Tensor) -> Any:
    """The kernels for these queries, or None where torch's operations run."""
    place = place_of(query)
    if place == "torch" or cards.is_before_ampere():
        return None
    if place == "meta":
        return OnShapes
    from kestrel.model.kernels import attention_gpu

    return attention_gpu if attention_gpu.supports(query) else None


class _FusedAttention(torch.autograd.Function):
    """(kernels, query, key, value) → output."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, sums = kernels.attend(query, key, value)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.kernels = kernels
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor, torch.Tensor]:
        of_query, of_key_and_value = ctx.kernels.attend_backward(grad, *ctx.saved_tensors)
        of_key, of_value = of_key_and_value[:, None].unbind(3)
        return None, of_query.transpose(1, 2), of_key, of_value


class _BlockwiseAttention(torch.autograd.Function):
    """Plain matrix products for CPUs, faster than torch's CPU kernel at the lengths of dialogues.

    The query heads that share a key/value head are rows of one matrix, and a block of queries skips the keys after its last
    one. The attention weights are kept; autograd over the single steps would traverse scores and keys twice as often.

    Inputs and output have the shapes of `attend`.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scale = query.shape[-1] ** -0.5
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=query.device).triu(1)[:, None]
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        kept = []
        for start, end in _blocks(query.shape[2]):
            rows = _rows_of(query, start, end, key.shape[1])
            scores = torch.baddbmm(rows.new_empty(()), rows, keys[:, :end].transpose(1, 2), beta=0, alpha=scale)
            own = scores.unflatten(1, (end - start, -1))[..., start:]
            own.masked_fill_(later[: end - start, :, : end - start], float("-inf"))
            weights = scores.softmax(dim=-1)
            _write_rows(out, start, end, torch.bmm(weights, values[:, :end]))
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, *kept = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        of_query = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        of_key, of_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (keys, values))
        for (start, end), weights in zip(_blocks(query.shape[2]), kept, strict=True):
            rows, grad_rows = (_rows_of(t, start, end, key.shape[1]) for t in (query, grad))
            of_value[:, :end] += torch.bmm(weights.transpose(1, 2), grad_rows)
            of_weights = torch.bmm(grad_rows, values[:, :end].transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(scale)
            _write_rows(of_query, start, end, torch.bmm(of_scores, keys[:, :end]))
            of_key[:, :end] += torch.bmm(of_scores.transpose(1, 2), rows)
        return of_query, of_key.view(key.shape), of_value.view(key.shape)


def _rows_of(x: torch.Tensor, start: int, end: int, kv_heads: int) -> torch.Tensor:
    """(batch, heads, length, size) → (batch * key/value heads, positions * query heads of each, size), of some positions."""
    return x[:, :, start:end].unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _write_rows(out: torch.Tensor, start: int, end: int, rows: torch.Tensor) -> None:
    """The reverse of `_rows_of`, into the places of these positions."""
    kv_heads = rows.shape[0] // out.shape[0]
    places = out[:, :, start:end].unflatten(1, (kv_heads, -1)).transpose(2, 3)
    places.copy_(rows.view(places.shape))


def _suits_blocks(query: torch.Tensor) -> bool:
    """On a CPU, and when what one allocates is estimated."""
    on_cpu = place_of(query) == "torch" and not query.is_cuda
    return on_cpu and query.dtype in (torch.bfloat16, torch.float32) and query.shape[2] <= _LONGEST_IN_BLOCKS


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of queries."""
    return ((start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK))


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of many query heads to one key/value head.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, 1, length, head size).

    Returns:
        (batch, heads, length, head size).
    """
    kernels = kernels_for(query)
    if kernels is not None:
        out: torch.Tensor = _FusedAttention.apply(kernels, query, key, value)
        return out
    if _suits_blocks(query):
        by_blocks: torch.Tensor = _BlockwiseAttention.apply(query, key, value)
        return by_blocks
    heads = (-1, query.shape[1], -1, -1)
    return F.scaled_dot_product_attention(query, key.expand(heads), value.expand(heads), is_causal=True)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of grouped heads.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, key/value heads, length, head size).
        window: how many positions back it reaches, the own included; None: all.

    Returns:
        As the queries.
    """
    length = query.shape[2]
    if window is not None and window < length:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
        return F.scaled_dot_product_attention(query, *_expanded(query, key, value), attn_mask=mask)
    if key.shape[1] == 1 and query.shape[1] > 1:
        return causal_attention(query, key, value)
    if _suits_blocks(query):
        by_blocks: torch.Tensor = _BlockwiseAttention.apply(query, key, value)
        return by_blocks
    if (query.is_meta or query.is_cuda) and not cards.is_before_ampere():
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(query, *_expanded(query, key, value), is_causal=True)


def _expanded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, repeated for each query head: what the kernels without grouped heads need."""
    each = query.shape[1] // key.shape[1]
    return (key, value) if each == 1 else (key.repeat_interleave(each, 1), value.repeat_interleave(each, 1))


@contextmanager
def stock_attention() -> Iterator[None]:
    """torch's own function inside the block, for comparison."""
    former = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _stock
    try:
        yield
    finally:
        F.scaled_dot_product_attention = former
