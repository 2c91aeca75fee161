"""The kernels of `low_rank.py` in Triton: products of a wide matrix with a narrow one, the wide one dropped in passing.

Products read the compute type and add up in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kestrel.model.kernels import cards
from kestrel.model.kernels.sizes import ceil_div, power_of_two

# Sizes of tiles, and how many programs there are at least, so that the multiprocessors of any card are occupied.
_PROJECT = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
_PROJECT_PROGRAMS = 512
_GRADIENT = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 3}
_GRADIENT_PROGRAMS = 1024
_ADD = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8}


def widest() -> int:
    """Ranks that a kernel holds at once; 256 take 143,360 bytes of shared memory."""
    return 256 if cards.shared_memory() >= 143_360 else 128


@triton.jit
def _kept(seed, rows, first, threshold, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which numbers of a tile are kept: (rows, COLUMNS), at columns from `first`, a multiple of 8.

    One draw of the generator gives eight numbers of 16 bits, so that p is met to 1 / 65536. Seven of Philox' ten rounds
    pass the tests that its authors hold it to (Salmon and others, 2011). Its counter is (eighth of the columns, row), so
    that the first round and a half are computed once for each row and for each eighth of the columns.
    """
    eighths = first // 8 + tl.arange(0, COLUMNS // 8)
    a, b, c, d = tl.philox(seed, eighths[None, :], rows.to(tl.int32)[:, None], 0, 0, n_rounds=7)
    limit = threshold.to(tl.uint32) << 16
    even = tl.join(tl.join(a << 16 >= limit, b << 16 >= limit), tl.join(c << 16 >= limit, d << 16 >= limit))
    odd = tl.join(tl.join(a >= limit, b >= limit), tl.join(c >= limit, d >= limit))
    return tl.join(even, odd).reshape(rows.shape[0], COLUMNS)


@triton.jit(do_not_specialize=["tokens", "threshold", "seed"])
def _project_kernel(  # type: ignore[no-untyped-def]
    x_of, a_of, out, tokens, inputs, stride, ranks, threshold, scale, seed, columns_each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    begin = tl.program_id(1) * columns_each
    for first in range(begin, tl.minimum(begin + columns_each, inputs), COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = (rows < tokens)[:, None] & (column < inputs)[None, :]
        x = tl.load(x_of + rows[:, None] * stride + column[None, :], mask=there, other=0.0)
        x = tl.where(_kept(seed, rows, first, threshold, COLUMNS), x, 0.0)
        a = tl.load(
            a_of + rank[None, :] * inputs + column[:, None],
            mask=(rank < ranks)[None, :] & (column < inputs)[:, None],
            other=0.0,
        )
        acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
    write = out + (tl.program_id(1).to(tl.int64) * tokens + rows[:, None]) * ranks + rank[None, :]
    tl.store(write, acc * scale, mask=(rows < tokens)[:, None] & (rank < ranks)[None, :])


def project(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """As `low_rank.project`. Where there are few tokens, sums are made in parts to occupy a GPU, and added up in order."""
    if len(a) > widest():
        return torch.cat([project(x, part, p, seed) for part in a.split(widest())], dim=1)
    tokens, inputs = x.shape
    ranks = _padded(len(a))
    tiles = _PROJECT if ranks <= 64 else {"ROWS": 16, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    blocks = ceil_div(tokens, tiles["ROWS"])
    parts = max(1, min(_PROJECT_PROGRAMS // blocks, inputs // 512))
    columns_each = ceil_div(ceil_div(inputs, parts), tiles["COLUMNS"]) * tiles["COLUMNS"]
    parts = ceil_div(inputs, columns_each)
    out = x.new_empty(parts, tokens, len(a), dtype=x.dtype if parts == 1 else torch.float32)
    _project_kernel[(blocks, parts)](
        x, a, out, tokens, inputs, x.stride(0), len(a), round(p * 65536), 1 / (1 - p), seed, columns_each,
        RANKS=ranks, **tiles,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["tokens", "threshold", "seed"])
def _project_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_of, x_of, partial, tokens, inputs, stride, ranks, threshold, scale, seed, rows_each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    acc = tl.zeros([RANKS, COLUMNS], tl.float32)
    begin = tl.program_id(1) * rows_each
    for start in range(begin, tl.minimum(begin + rows_each, tokens), ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = (rows < tokens)[:, None] & (column < inputs)[None, :]
        x = tl.load(x_of + rows[:, None] * stride + column[None, :], mask=there, other=0.0)
        x = tl.where(_kept(seed, rows, first, threshold, COLUMNS), x, 0.0)
        grad = tl.load(
            grad_of + rows[None, :] * ranks + rank[:, None],
            mask=(rank < ranks)[:, None] & (rows < tokens)[None, :],
            other=0.0,
        )
        acc = tl.dot(grad, x.to(grad.dtype), acc, input_precision="ieee")
    write = partial + (tl.program_id(1) * ranks + rank[:, None]).to(tl.int64) * inputs + column[None, :]
    tl.store(write, acc * scale, mask=(rank < ranks)[:, None] & (column < inputs)[None, :])


def project_gradient(grad_low: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """As `low_rank.project_gradient`. Sums over tokens are made in parts, which are added up in order: no atomics."""
    if grad_low.shape[1] > widest():
        return torch.cat([project_gradient(part.contiguous(), x, p, seed) for part in grad_low.split(widest(), dim=1)])
    tokens, inputs = x.shape
    ranks = grad_low.shape[1]
    padded = _padded(ranks)
    tiles = _GRADIENT if padded <= 64 else {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 3}
    blocks = ceil_div(inputs, tiles["COLUMNS"])
    parts = max(1, min(ceil_div(tokens, 256), ceil_div(_GRADIENT_PROGRAMS, blocks)))
    rows_each = ceil_div(ceil_div(tokens, parts), tiles["ROWS"]) * tiles["ROWS"]
    parts = ceil_div(tokens, rows_each)
    partial = torch.empty(parts, ranks, inputs, dtype=torch.float32, device=x.device)
    _project_gradient_kernel[(blocks, parts)](
        grad_low, x, partial, tokens, inputs, x.stride(0), ranks, round(p * 65536), 1 / (1 - p), seed, rows_each,
        RANKS=padded, **tiles,
    )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0)


@triton.jit(do_not_specialize=["tokens", "threshold", "seed"])
def _add_input_gradient_kernel(  # type: ignore[no-untyped-def]
    total, grad_of, a_of, tokens, inputs, stride, ranks, threshold, scale, seed,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    place = tl.arange(0, COLUMNS)
    column = first + place
    rank = tl.arange(0, RANKS)
    there = (rows < tokens)[:, None] & (column < inputs)[None, :]
    here = total + rows[:, None] * stride + column[None, :]
    old = tl.load(here, mask=there, other=0.0)  # at first, so that the draws hide its latency
    grad = tl.load(
        grad_of + rows[:, None] * ranks + rank[None, :],
        mask=(rows < tokens)[:, None] & (rank < ranks)[None, :],
        other=0.0,
    )
    # Of each 32 columns of a product, four threads of a matrix unit hold 2 of each 8. A's columns are multiplied in such an
    # order that these are 8 neighbours in the result: those of one draw, so that no thread needs another's.
    permuted = first + place // 32 * 32 + place // 2 % 4 * 8 + place // 8 % 4 * 2 + place % 2
    a = tl.load(
        a_of + rank[:, None] * inputs + permuted[None, :],
        mask=(rank < ranks)[:, None] & (permuted < inputs)[None, :],
        other=0.0,
    )
    part = tl.dot(grad, a, input_precision="ieee") * scale
    part = part.reshape(ROWS, COLUMNS // 32, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, COLUMNS)
    kept = tl.where(_kept(seed, rows, first, threshold, COLUMNS), part, 0.0)
    tl.store(here, old.to(tl.float32) + kept, mask=there)


def add_input_gradient_(grad_x: Tensor, grad_low: Tensor, a: Tensor, p: float, seed: int) -> None:
    """As `low_rank.add_input_gradient_`."""
    if len(a) > widest():
        for of_some, some in zip(grad_low.split(widest(), dim=1), a.split(widest()), strict=True):
            add_input_gradient_(grad_x, of_some.contiguous(), some, p, seed)
        return
    tokens, inputs = grad_x.shape
    ranks = _padded(len(a))
    grid = (ceil_div(inputs, _ADD["COLUMNS"]), ceil_div(tokens, _ADD["ROWS"]))
    _add_input_gradient_kernel[grid](
        grad_x, grad_low, a, tokens, inputs, grad_x.stride(0), len(a), round(p * 65536), 1 / (1 - p), seed,
        RANKS=ranks, **_ADD,
    )  # fmt: skip


def _padded(ranks: int) -> int:
    """The next power of two that matrix units take."""
    return max(16, power_of_two(ranks))
