"""Causal attention of many query heads to one key/value head, in Triton.

All heads share the keys, so a block of queries is several heads at neighbouring positions: it reads each key once for all
of them, and wastes little beyond the diagonal although dialogues are short. The gradients of key and value are summed over
the heads of a block where they are computed. Scores never reach memory (Dao, FlashAttention-2, 2023); the backward pass
recomputes them, once for the gradient of the queries and once for those of key and value.

Products read the compute type and accumulate in float32. `tests/model/test_attention.py` compares with plain products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kestrel.model.kernels import cards
from kestrel.model.kernels.sizes import ceil_div

# Sizes of the blocks of queries and keys, and warps: the fastest of about a dozen on an H200.
_FORWARD = {"POSITIONS": 16, "HEADS": 8, "KEYS": 32, "num_warps": 8, "num_stages": 2}
_OF_QUERIES = {"POSITIONS": 16, "HEADS": 8, "KEYS": 32, "num_warps": 8, "num_stages": 2}
_OF_KEYS = {"POSITIONS": 8, "HEADS": 8, "KEYS": 64, "num_warps": 4, "num_stages": 1}
# Bytes of shared memory that these take, by the size of a head; tests/model/test_compiled_kernels.py compiles them. Before
# sm_80 they take more, and the gradients are unrolled into code that takes minutes to compile.
_SHARED_MEMORY = {16: 16_384, 32: 24_576, 64: 49_152, 128: 98_304}
_LOG2E = 1.4426950408889634


@triton.jit
def _rows_of(block, group, length, heads, POSITIONS: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Position and head of each row of a block of queries, and whether the row exists."""
    row = tl.arange(0, POSITIONS * HEADS)
    position = block * POSITIONS + row // HEADS
    head = group * HEADS + row % HEADS
    return position, head, (position < length) & (head < heads)


@triton.jit
def _load_rows(start, position, head, valid, a_position, a_head, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of queries or their gradients: (rows, SIZE), zeros in rows that do not exist."""
    places = position[:, None] * a_position + head[:, None] * a_head + tl.arange(0, SIZE)[None, :]
    return tl.load(start + places, mask=valid[:, None], other=0.0)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys, values, k_length, v_length, position, highest, total, acc, begin, end, length, scale,
    DIAGONAL: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, SIZE)
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        valid = at < length
        k = tl.load(keys + at[None, :] * k_length + feature[:, None], mask=valid[None, :], other=0.0)
        scores = tl.dot(q, k) * scale
        if DIAGONAL:
            scores = tl.where(at[None, :] <= position[:, None], scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest, total = higher, total * shrink + tl.sum(weights, axis=1)
        v = tl.load(values + at[:, None] * v_length + feature[None, :], mask=valid[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return highest, total, acc


@triton.jit(do_not_specialize=["length", "q_batch", "k_batch", "v_batch"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    query, key, value, out, sums, length, heads, scale,
    q_batch, q_length, q_head, k_batch, k_length, v_batch, v_length,
    SIZE: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block, group, batch = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    position, head, valid = _rows_of(block, group, length, heads, POSITIONS, HEADS)
    feature = tl.arange(0, SIZE)
    q = _load_rows(query + batch * q_batch, position, head, valid, q_length, q_head, SIZE)
    keys, values = key + batch * k_batch, value + batch * v_batch
    highest = tl.full([POSITIONS * HEADS], -1e30, tl.float32)
    total = tl.zeros([POSITIONS * HEADS], tl.float32)
    acc = tl.zeros([POSITIONS * HEADS, SIZE], tl.float32)
    split = block * POSITIONS // KEYS * KEYS  # keys before all queries of the block
    end = tl.minimum(length, (block + 1) * POSITIONS)
    highest, total, acc = _attend(
        q, keys, values, k_length, v_length, position, highest, total, acc, 0, split, length, scale, False, SIZE, KEYS
    )
    highest, total, acc = _attend(
        q, keys, values, k_length, v_length, position, highest, total, acc, split, end, length, scale, True, SIZE, KEYS
    )
    row = position * heads + head
    tl.store(
        out + batch * length * heads * SIZE + row[:, None] * SIZE + feature[None, :], acc / total[:, None],
        mask=valid[:, None],
    )  # fmt: skip
    tl.store(sums + batch * length * heads + row, highest + tl.log2(total), mask=valid)


@triton.jit
def _of_queries(  # type: ignore[no-untyped-def]
    q, g, keys, values, k_length, v_length, position, logsum, delta, acc, begin, end, length, scale,
    DIAGONAL: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, SIZE)
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        valid = at < length
        k = tl.load(keys + at[:, None] * k_length + feature[None, :], mask=valid[:, None], other=0.0)
        v = tl.load(values + at[None, :] * v_length + feature[:, None], mask=valid[None, :], other=0.0)
        weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - logsum[:, None])
        if DIAGONAL:
            weights = tl.where(at[None, :] <= position[:, None], weights, 0.0)
        of_scores = weights * (tl.dot(g, v) - delta[:, None])
        acc = tl.dot(of_scores.to(k.dtype), k, acc)
    return acc


@triton.jit(do_not_specialize=["length", "q_batch", "k_batch", "v_batch", "g_batch"])
def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    query, key, value, out, grad, sums, deltas, grad_query, length, heads, scale, scale_of_gradient,
    q_batch, q_length, q_head, k_batch, k_length, v_batch, v_length, g_batch, g_length, g_head,
    SIZE: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    block, group, batch = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    position, head, valid = _rows_of(block, group, length, heads, POSITIONS, HEADS)
    feature = tl.arange(0, SIZE)
    q = _load_rows(query + batch * q_batch, position, head, valid, q_length, q_head, SIZE)
    g = _load_rows(grad + batch * g_batch, position, head, valid, g_length, g_head, SIZE)
    before = batch * length * heads
    row = position * heads + head
    whole = row[:, None] * SIZE + feature[None, :]
    o = tl.load(out + before * SIZE + whole, mask=valid[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(deltas + before + row, delta, mask=valid)
    logsum = tl.load(sums + before + row, mask=valid, other=0.0)
    keys, values = key + batch * k_batch, value + batch * v_batch
    acc = tl.zeros([POSITIONS * HEADS, SIZE], tl.float32)
    split = block * POSITIONS // KEYS * KEYS
    end = tl.minimum(length, (block + 1) * POSITIONS)
    acc = _of_queries(
        q, g, keys, values, k_length, v_length, position, logsum, delta, acc, 0, split, length, scale, False, SIZE,
        KEYS,
    )  # fmt: skip
    acc = _of_queries(
        q, g, keys, values, k_length, v_length, position, logsum, delta, acc, split, end, length, scale, True,
        SIZE, KEYS,
    )  # fmt: skip
    tl.store(grad_query + before * SIZE + whole, acc * scale_of_gradient, mask=valid[:, None])


@triton.jit
def _of_keys(  # type: ignore[no-untyped-def]
    k, v, queries, grads, sums, deltas, q_length, q_head, g_length, g_head, at, of_key, of_value, begin, end,
    group, length, heads, scale,
    DIAGONAL: tl.constexpr, SIZE: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    for block in range(begin, end):
        position, head, valid = _rows_of(block, group, length, heads, POSITIONS, HEADS)
        row = position * heads + head
        # Rows that do not exist read zeros and add nothing.
        q = _load_rows(queries, position, head, valid, q_length, q_head, SIZE)
        g = _load_rows(grads, position, head, valid, g_length, g_head, SIZE)
        logsum = tl.load(sums + row, mask=valid, other=0.0)
        delta = tl.load(deltas + row, mask=valid, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - logsum[None, :])
        if DIAGONAL:
            weights = tl.where(at[:, None] <= position[None, :], weights, 0.0)
        of_value = tl.dot(weights.to(g.dtype), g, of_value)
        of_scores = weights * (tl.dot(v, tl.trans(g)) - delta[None, :])
        of_key = tl.dot(of_scores.to(q.dtype), q, of_key)
    return of_key, of_value


@triton.jit(do_not_specialize=["length", "q_batch", "k_batch", "v_batch", "g_batch"])
def _key_value_gradient_kernel(  # type: ignore[no-untyped-def]
    query, key, value, grad, sums, deltas, partial, length, heads, scale, scale_of_gradient,
    q_batch, q_length, q_head, k_batch, k_length, v_batch, v_length, g_batch, g_length, g_head,
    SIZE: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, summed over the heads of one group: (group, batch, length, 2, SIZE)."""
    block, group, batch = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    at = block * KEYS + tl.arange(0, KEYS)
    valid = (at < length)[:, None]
    feature = tl.arange(0, SIZE)[None, :]
    k = tl.load(key + batch * k_batch + at[:, None] * k_length + feature, mask=valid, other=0.0)
    v = tl.load(value + batch * v_batch + at[:, None] * v_length + feature, mask=valid, other=0.0)
    of_key = tl.zeros([KEYS, SIZE], tl.float32)
    of_value = tl.zeros([KEYS, SIZE], tl.float32)
    queries, grads, before = query + batch * q_batch, grad + batch * g_batch, batch * length * heads
    blocks = tl.cdiv(length, POSITIONS)
    begin = block * KEYS // POSITIONS
    middle = tl.minimum(blocks, begin + KEYS // POSITIONS)  # from here on, all keys of the block are before the queries
    of_key, of_value = _of_keys(
        k, v, queries, grads, sums + before, deltas + before, q_length, q_head, g_length, g_head, at, of_key, of_value,
        begin, middle, group, length, heads, scale, True, SIZE, POSITIONS, HEADS,
    )  # fmt: skip
    of_key, of_value = _of_keys(
        k, v, queries, grads, sums + before, deltas + before, q_length, q_head, g_length, g_head, at, of_key, of_value,
        middle, blocks, group, length, heads, scale, False, SIZE, POSITIONS, HEADS,
    )  # fmt: skip
    write = partial + ((group * tl.num_programs(2) + batch) * length + at[:, None]) * 2 * SIZE + feature
    tl.store(write, of_key * scale_of_gradient, mask=valid)
    tl.store(write + SIZE, of_value, mask=valid)


def supports(query: Tensor) -> bool:
    """Whether these kernels compute attention of such queries on this card."""
    needed, card = _SHARED_MEMORY.get(query.shape[-1]), cards.capability()
    fits = needed is not None and card is not None and card >= (8, 0) and needed <= cards.shared_memory()
    return fits and query.dtype in (torch.bfloat16, torch.float16)


def _blocks(heads: int, length: int, batch: int, of: dict[str, int], along: str) -> tuple[int, int, int]:
    return ceil_div(heads, of["HEADS"]), ceil_div(length, of[along]), batch


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention.

    Args:
        query: (batch, heads, length, size); the last stride is 1, here and below.
        key, value: (batch, 1, length, size).

    Returns:
        (batch, length, heads, size), and float32 (batch, length, heads): the logarithm to base 2 of each query's sum.
    """
    batch, heads, length, size = query.shape
    out = query.new_empty(batch, length, heads, size)
    sums = torch.empty(batch, length, heads, dtype=torch.float32, device=query.device)
    _forward_kernel[_blocks(heads, length, batch, _FORWARD, "POSITIONS")](
        query, key, value, out, sums, length, heads, size**-0.5 * _LOG2E, *_strides(query, key, value),
        SIZE=size, **_FORWARD,
    )  # fmt: skip
    return out, sums


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs of `attend`.

    Args:
        grad: (batch, heads, length, size), of the output.
        query, key, value: as given.
        out, sums: as returned.

    Returns:
        Of the queries, (batch, length, heads, size), and of key and value, (batch, length, 2, size).
    """
    batch, heads, length, size = query.shape
    scale = size**-0.5
    strides = (*_strides(query, key, value), grad.stride(0), grad.stride(2), grad.stride(1))
    of_query, deltas = torch.empty_like(out), torch.empty_like(sums)
    _query_gradient_kernel[_blocks(heads, length, batch, _OF_QUERIES, "POSITIONS")](
        query, key, value, out, grad, sums, deltas, of_query, length, heads, scale * _LOG2E, scale, *strides,
        SIZE=size, **_OF_QUERIES,
    )  # fmt: skip
    grid = _blocks(heads, length, batch, _OF_KEYS, "KEYS")
    partial = torch.empty(grid[0], batch, length, 2, size, dtype=torch.float32, device=query.device)
    _key_value_gradient_kernel[grid](
        query, key, value, grad, sums, deltas, partial, length, heads, scale * _LOG2E, scale, *strides,
        SIZE=size, **_OF_KEYS,
    )  # fmt: skip
    return of_query, partial.sum(0).to(key.dtype)


def _strides(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    return (*(query.stride(dim) for dim in (0, 2, 1)), key.stride(0), key.stride(2), value.stride(0), value.stride(2))
