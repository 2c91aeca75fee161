"""The kernels of `elementwise.py` in Triton. Arithmetic is in float32 whatever is read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _rotate_rows(source, target, source_head, heads, cos, sin, SIZE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotates `heads` rows of 2 × SIZE, `source_head` apart, into contiguous ones."""
    place = tl.arange(0, SIZE)
    head = tl.arange(0, ROWS)[:, None]
    there = head < heads
    read = source + head * source_head + place[None, :]
    low = tl.load(read, mask=there).to(tl.float32)
    high = tl.load(read + SIZE, mask=there).to(tl.float32)
    write = target + head * (2 * SIZE) + place[None, :]
    tl.store(write, low * cos[None, :] - high * sin[None, :], mask=there)
    tl.store(write + SIZE, high * cos[None, :] + low * sin[None, :], mask=there)


# A length is sometimes a multiple of 16; compiling a second kernel for that would cost more than it saves.
@triton.jit(do_not_specialize=["length", "q_batch", "k_batch", "v_batch"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    query, key, value, cos, sin, out,
    length, heads, sign, q_batch, q_length, q_head, k_batch, k_length, v_batch, v_length,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    place = tl.arange(0, SIZE)
    c = tl.load(cos + position * 2 * SIZE + place).to(tl.float32)
    s = tl.load(sin + position * 2 * SIZE + place).to(tl.float32) * sign
    target = out + token * (heads + 2) * 2 * SIZE
    _rotate_rows(query + batch * q_batch + position * q_length, target, q_head, heads, c, s, SIZE, ROWS)
    key_target = target + heads * 2 * SIZE
    _rotate_rows(key + batch * k_batch + position * k_length, key_target, 0, 1, c, s, SIZE, 1)
    whole = tl.arange(0, 2 * SIZE)
    held = tl.load(value + batch * v_batch + position * v_length + whole)
    tl.store(key_target + 2 * SIZE + whole, held)


def rotate(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """As `elementwise.rotate`; size / 2 is a power of two. Each program does one token, so that it may work in place."""
    query, key, value = parts
    batch, length, heads, size = query.shape
    _rotate_kernel[(batch * length,)](
        query, key, value, cos, sin, out,
        length, heads, -1.0 if back else 1.0, *query.stride()[:3], *key.stride()[:2], *value.stride()[:2],
        SIZE=size // 2, ROWS=triton.next_power_of_2(heads), num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def _dropout_kernel(part, total, out, count, p, scale, seed, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # One draw of the generator gives four numbers; each program's four blocks take one each. Seven of Philox' ten rounds
    # pass the tests that its authors hold it to (Salmon and others, 2011).
    draws = tl.rand4x(seed, program * BLOCK + lane, n_rounds=7)
    for quarter in tl.static_range(4):
        place = program * (4 * BLOCK) + quarter * BLOCK + lane
        there = place < count
        x = tl.load(part + place, mask=there).to(tl.float32)
        kept = tl.where(draws[quarter] >= p, x * scale, 0.0)
        if ADD:
            kept += tl.load(total + place, mask=there).to(tl.float32)
        tl.store(out + place, kept, mask=there)


def _drop(part: Tensor, total: Tensor, out: Tensor, p: float, seed: int, add: bool) -> Tensor:
    count = part.numel()
    grid = (triton.cdiv(count, 4 * _BLOCK),)
    _dropout_kernel[grid](part, total, out, count, p, 1 / (1 - p), seed, ADD=add, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """As `elementwise.dropout`, of a contiguous tensor."""
    return _drop(x, x, torch.empty_like(x), p, seed, add=False)


def add_dropout_(total: Tensor, part: Tensor, p: float, seed: int) -> Tensor:
    """As `elementwise.add_dropout_`, of contiguous tensors."""
    return _drop(part, total, total, p, seed, add=True)


@triton.jit
def _norm_kernel(x_of, weight_of, bias_of, out, means, deviations, size, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < size
    x = tl.load(x_of + row * size + place, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / size
    centred = tl.where(there, x - mean, 0.0)
    deviation = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / size + eps)
    weight = tl.load(weight_of + place, mask=there).to(tl.float32)
    bias = tl.load(bias_of + place, mask=there).to(tl.float32)
    tl.store(out + row * size + place, centred * deviation * weight + bias, mask=there)
    tl.store(means + row, mean)
    tl.store(deviations + row, deviation)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `elementwise.norm`, of a contiguous tensor. Each program does one row."""
    rows, size = x.shape
    out = torch.empty_like(x)
    mean, deviation = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _norm_kernel[(rows,)](x, weight, bias, out, mean, deviation, size, eps, BLOCK=block, num_warps=8)
    return out, mean, deviation


@triton.jit
def _norm_backward_kernel(grad_of, x_of, means, deviations, weight_of, more_of, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < size
    here = row * size + place
    deviation = tl.load(deviations + row)
    x = tl.load(x_of + here, mask=there, other=0.0).to(tl.float32)
    normed = tl.where(there, (x - tl.load(means + row)) * deviation, 0.0)
    grad = tl.load(grad_of + here, mask=there, other=0.0).to(tl.float32)
    grad *= tl.load(weight_of + place, mask=there, other=0.0).to(tl.float32)
    along = tl.sum(grad * normed, axis=0) / size
    result = (grad - tl.sum(grad, axis=0) / size - normed * along) * deviation
    result += tl.load(more_of + here, mask=there, other=0.0).to(tl.float32)
    tl.store(out + here, result, mask=there)


def norm_backward(grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, more: Tensor) -> Tensor:
    """As `elementwise.norm_backward`, of contiguous tensors. Each program does one row."""
    rows, size = x.shape
    out, block = torch.empty_like(x), triton.next_power_of_2(size)
    _norm_backward_kernel[(rows,)](grad, x, mean, deviation, weight, more, out, size, BLOCK=block, num_warps=8)
    return out


@triton.jit
def _gelu_kernel(x_of, grad_of, out, count, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    x = tl.load(x_of + place, mask=there).to(tl.float32)
    y = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    if BACKWARD:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = tl.load(grad_of + place, mask=there).to(tl.float32) * (y + x * density)
    else:
        y = x * y
    tl.store(out + place, y, mask=there)


def gelu(x: Tensor) -> Tensor:
    """As `elementwise.gelu`, of a contiguous tensor."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    _gelu_kernel[grid](x, x, out, x.numel(), BACKWARD=False, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """As `elementwise.gelu_backward_`, of contiguous tensors."""
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    _gelu_kernel[grid](x, grad, grad, x.numel(), BACKWARD=True, BLOCK=_BLOCK, num_warps=_WARPS)
    return grad


def dequantizes(state: Any) -> bool:
    """Whether these constants are laid out as `dequantize` reads them: bitsandbytes' nested 4-bit blocks."""
    second = state.state2 if state.nested else None
    return second is not None and second.blocksize == 256 and state.blocksize == 64 and state.shape.numel() % 64 == 0


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed, code, scales, scale_code, scale_scales, offset, out, count, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of a byte, which holds two weights
    there = place < count
    byte = tl.load(packed + place, mask=there, other=0).to(tl.int32)
    block = place // 32  # 64 weights share a scale
    scale = tl.load(scale_code + tl.load(scales + block, mask=there, other=0).to(tl.int32))
    scale = scale * tl.load(scale_scales + block // 256, mask=there, other=0.0) + tl.load(offset)
    first, second = tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale
    both = tl.interleave(first, second)
    write = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + write, both, mask=write < 2 * count)


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Dense (out, in) weights of packed 4-bit ones whose constants are quantized too (`dequantizes`)."""
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    count, nested = packed.numel(), state.state2
    _dequantize_kernel[(triton.cdiv(count, _BLOCK),)](
        packed, state.code, state.absmax, nested.code, nested.absmax, state.offset, out, count,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return out
