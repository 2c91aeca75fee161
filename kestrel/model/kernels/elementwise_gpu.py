"""The operations of `elementwise.py` as Triton kernels. Arithmetic is in float32 whatever the inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["seed"])
def _dropout_kernel(part, total, out, count, p, scale, seed, ADD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # Each draw gives four numbers, one for each of the program's four blocks. Seven of Philox' ten rounds pass its
    # authors' tests (Salmon et al., 2011).
    draws = tl.rand4x(seed, program * BLOCK + lane, n_rounds=7)
    for quarter in tl.static_range(4):
        place = program * (4 * BLOCK) + quarter * BLOCK + lane
        valid = place < count
        x = tl.load(part + place, mask=valid).to(tl.float32)
        kept = tl.where(draws[quarter] >= p, x * scale, 0.0)
        if ADD:
            kept += tl.load(total + place, mask=valid).to(tl.float32)
        tl.store(out + place, kept, mask=valid)


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
    valid = place < size
    x = tl.load(x_of + row * size + place, mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / size
    centred = tl.where(valid, x - mean, 0.0)
    deviation = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / size + eps)
    weight = tl.load(weight_of + place, mask=valid).to(tl.float32)
    bias = tl.load(bias_of + place, mask=valid).to(tl.float32)
    tl.store(out + row * size + place, centred * deviation * weight + bias, mask=valid)
    tl.store(means + row, mean)
    tl.store(deviations + row, deviation)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `elementwise.norm`, of a contiguous tensor. Each program does one row."""
    rows, size = x.shape
    out = torch.empty_like(x)
    mean, deviation = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _norm_kernel[(rows,)](x, weight, bias, out, mean, deviation, size, eps, BLOCK=block, num_warps=4)
    return out, mean, deviation


@triton.jit
def _norm_backward_kernel(grad_of, x_of, means, deviations, weight_of, more_of, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    valid = place < size
    here = row * size + place
    deviation = tl.load(deviations + row)
    x = tl.load(x_of + here, mask=valid, other=0.0).to(tl.float32)
    normed = tl.where(valid, (x - tl.load(means + row)) * deviation, 0.0)
    grad = tl.load(grad_of + here, mask=valid, other=0.0).to(tl.float32)
    grad *= tl.load(weight_of + place, mask=valid, other=0.0).to(tl.float32)
    along = tl.sum(grad * normed, axis=0) / size
    result = (grad - tl.sum(grad, axis=0) / size - normed * along) * deviation
    result += tl.load(more_of + here, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + here, result, mask=valid)


def norm_backward(grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, more: Tensor) -> Tensor:
    """As `elementwise.norm_backward`, of contiguous tensors. Each program does one row."""
    rows, size = x.shape
    out, block = torch.empty_like(x), triton.next_power_of_2(size)
    _norm_backward_kernel[(rows,)](grad, x, mean, deviation, weight, more, out, size, BLOCK=block, num_warps=8)
    return out


@triton.jit
def _gelu_kernel(x_of, grad_of, out, count, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    valid = place < count - start
    x = tl.load(x_of + start + place, mask=valid).to(tl.float32)
    # The normal distribution's tail beyond |x|, within 1e-7: Abramowitz and Stegun, 7.1.26. The library's error function
    # takes longer than the memory access, and the gradient needs this exponential anyway.
    bell = tl.exp2(x * x * -0.7213475204444817)
    t = 1 / (1 + 0.2316418882663604 * tl.abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
    y = tl.where(x < 0, tail, 1 - tail)
    if BACKWARD:
        y = tl.load(grad_of + start + place, mask=valid).to(tl.float32) * (y + x * bell * 0.3989422804014327)
    else:
        y = x * y
    tl.store(out + start + place, y, mask=valid)


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


@triton.jit
def _nll_kernel(logits_of, targets, nll, width, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits_of + row * width
    target = tl.load(targets + row)
    wanted = tl.load(start + target).to(tl.float32)  # before it is overwritten
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        x = tl.load(start + first + lane, mask=first + lane < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        sums = sums * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, axis=0)
    whole = top + tl.log(tl.sum(sums * tl.exp(highest - top), axis=0))
    tl.store(nll + row, whole - wanted)
    if BACKWARD:
        for first in range(0, width, BLOCK):
            valid = first + lane < width
            x = tl.load(start + first + lane, mask=valid).to(tl.float32)
            tl.store(start + first + lane, tl.exp(x - whole) - tl.where(first + lane == target, 1.0, 0.0), mask=valid)


def nll(logits: Tensor, targets: Tensor, backward: bool) -> Tensor:
    """As `elementwise.nll`, of contiguous logits. Each program does one row."""
    result = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _nll_kernel[(len(logits),)](
        logits, targets, result, logits.shape[1], BACKWARD=backward, BLOCK=4 * _BLOCK, num_warps=8
    )
    return result


def dequantizes(state: Any) -> bool:
    """Whether `dequantize` reads this layout: bitsandbytes' nested 4-bit blocks."""
    second = state.state2 if state.nested else None
    return second is not None and second.blocksize == 256 and state.blocksize == 64 and state.shape.numel() % 64 == 0


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed, code, scales, scale_code, scale_scales, offset, out, count, BLOCKS: tl.constexpr
):
    """Dequantizes BLOCKS blocks, each of 64 weights in 32 bytes with one scale."""
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    valid = block < count - start
    scale = tl.load(scale_code + tl.load(scales + start + block, mask=valid, other=0).to(tl.int32))
    scale = scale * tl.load(scale_scales + (start + block) // 256, mask=valid, other=0.0) + tl.load(offset)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed + start * 32 + place, mask=valid[:, None], other=0).to(tl.int32)
    first, second = tl.load(code + (byte >> 4)) * scale[:, None], tl.load(code + (byte & 15)) * scale[:, None]
    write = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + start * 64 + write, tl.interleave(first, second), mask=valid[:, None])


_QUANTIZATION_BLOCKS = 32


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Dense (out, in) weights of packed 4-bit ones with quantized constants (`dequantizes`)."""
    if out is None:
        out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    count, nested = packed.numel() // 32, state.state2
    _dequantize_kernel[(triton.cdiv(count, _QUANTIZATION_BLOCKS),)](
        packed, state.code, state.absmax, nested.code, nested.absmax, state.offset, out, count,
        BLOCKS=_QUANTIZATION_BLOCKS, num_warps=_WARPS,
    )  # fmt: skip
    return out
