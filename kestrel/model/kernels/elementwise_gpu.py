"""The operations of `elementwise.py` as Triton kernels. Arithmetic is in float32 whatever the inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kestrel.model.kernels.sizes import ceil_div, power_of_two

_BLOCK = 1024
_WARPS = 4


# Where the second half of the statistics begins depends on the number of rows; a copy of the kernel for each alignment would be
# compiled in the middle of training.
@triton.jit(do_not_specialize_on_alignment=["means", "inverses"])
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_of, weight_of, bias_of, out, means, inverses, size, stride, eps, offset,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    valid = place < size
    x = tl.load(x_of + row * size + place, mask=valid, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=0) / size
        x = tl.where(valid, x - mean, 0.0)
        tl.store(means + row, mean)
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    result = x * inverse * (tl.load(weight_of + place, mask=valid).to(tl.float32) + offset)
    if CENTRED:
        result += tl.load(bias_of + place, mask=valid).to(tl.float32)
    tl.store(out + row * stride + place, result, mask=valid)
    tl.store(inverses + row, inverse)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float = 0.0, spare: int = 0
) -> tuple[Tensor, Sequence[Tensor]]:
    """As `elementwise.norm`. Each program does one row."""
    rows, size = x.shape
    out, centred = x.new_empty(rows, size + spare)[:, :size], bias is not None
    statistics = torch.empty(1 + centred, rows, dtype=torch.float32, device=x.device)
    block = power_of_two(size)
    _norm_kernel[(rows,)](
        x, weight, bias if centred else weight, out, statistics[0], statistics[-1], size, size + spare, eps,
        offset,
        CENTRED=centred, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out, statistics.unbind()


@triton.jit(do_not_specialize_on_alignment=["means", "inverses"])
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_of, x_of, means, inverses, weight_of, more_of, out, size, stride, offset,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    valid = place < size
    here = row * size + place
    inverse = tl.load(inverses + row)
    x = tl.load(x_of + here, mask=valid, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(valid, x - tl.load(means + row), 0.0)
    normed = x * inverse
    grad = tl.load(grad_of + row * stride + place, mask=valid, other=0.0).to(tl.float32)
    grad *= tl.load(weight_of + place, mask=valid, other=0.0).to(tl.float32) + offset
    result = grad - normed * (tl.sum(grad * normed, axis=0) / size)
    if CENTRED:
        result -= tl.sum(grad, axis=0) / size
    result = result * inverse + tl.load(more_of + here, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + here, result, mask=valid)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    offset: float,
    more: Tensor,
) -> Tensor:
    """As `elementwise.norm_backward`. Each program does one row."""
    rows, size = x.shape
    out, block = torch.empty_like(x), power_of_two(size)
    _norm_backward_kernel[(rows,)](
        grad, x, statistics[0], statistics[-1], weight, more, out, size, grad.stride(0), offset,
        CENTRED=bias is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4


@triton.jit
def _activate_kernel(  # type: ignore[no-untyped-def]
    before, grad, out, width, stride,
    KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, OUTPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = place < width
    gates, here = before + row * (1 + GATED) * width + place, row * stride + place
    gate = tl.load(gates, mask=valid, other=0.0).to(tl.float32)
    if KIND == "silu":
        share = tl.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    elif KIND == "gelu":
        # The normal distribution's tail beyond |x|, within 1e-7: Abramowitz and Stegun, 7.1.26. The library's error
        # function takes longer than the memory access, and the gradient needs this exponential anyway.
        bell = tl.exp2(gate * gate * -0.7213475204444817)
        t = 1 / (1 + 0.2316418882663604 * tl.abs(gate))
        fourth = -0.7265760135 + t * 0.5307027145
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * fourth))) * bell
        share = tl.where(gate < 0, tail, 1 - tail)
        slope = share + gate * bell * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        share = tl.sigmoid(2 * inner)  # (1 + tanh(inner)) / 2
        slope = share + gate * 2 * share * (1 - share) * 0.7978845608028654 * (1 + 0.134145 * gate * gate)
    output = gate * share
    if BACKWARD:
        slope *= tl.load(grad + here, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(gates + width, mask=valid, other=0.0).to(tl.float32)
        if BACKWARD:
            of_output = tl.load(grad + here, mask=valid, other=0.0).to(tl.float32)
            tl.store(gates + width, of_output * output, mask=valid)
            slope *= up
        output *= up
    if BACKWARD:
        tl.store(gates, slope, mask=valid)
    if OUTPUT:
        tl.store(out + here, output, mask=valid)


def _activate(before: Tensor, grad: Tensor, activation: str, gated: bool, backward: bool, output: bool) -> None:
    rows, width = grad.shape
    _activate_kernel[(rows, ceil_div(width, _BLOCK))](
        before, grad, grad, width, grad.stride(0), KIND=activation, GATED=gated, BACKWARD=backward, OUTPUT=output,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip


def activate(before: Tensor, activation: str, gated: bool, spare: int = 0) -> Tensor:
    """As `elementwise.activate`."""
    width = before.shape[1] >> gated
    out = before.new_empty(len(before), width + spare)[:, :width]
    _activate(before, out, activation, gated, backward=False, output=True)
    return out


def activate_backward_(grad: Tensor, before: Tensor, activation: str, gated: bool, output: bool) -> None:
    """As `elementwise.activate_backward_`."""
    _activate(before, grad, activation, gated, backward=True, output=output)


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


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed, code, scales, scale_code, scale_scales, offset, out, count, blocks_of_row, spare, BLOCKS: tl.constexpr
):
    """Dequantizes BLOCKS blocks, each of 64 weights in 32 bytes with one scale; `spare` numbers behind each row are left."""
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    valid = block < count - start
    scale = tl.load(scale_code + tl.load(scales + start + block, mask=valid, other=0).to(tl.int32))
    scale = scale * tl.load(scale_scales + (start + block) // 256, mask=valid, other=0.0) + tl.load(offset)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(packed + start * 32 + place, mask=valid[:, None], other=0).to(tl.int32)
    first, second = tl.load(code + (byte >> 4)) * scale[:, None], tl.load(code + (byte & 15)) * scale[:, None]
    row = (start + block).to(tl.int32) // blocks_of_row
    write = block[:, None] * 64 + tl.arange(0, 64)[None, :] + row.to(tl.int64)[:, None] * spare
    tl.store(out + start * 64 + write, tl.interleave(first, second), mask=valid[:, None])


_QUANTIZATION_BLOCKS = 32


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """As `elementwise.dequantize`, of weights with quantized constants."""
    if out is None:
        out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    count, nested = packed.numel() // 32, state.state2
    spare = out.stride(0) - out.shape[1]
    _dequantize_kernel[(ceil_div(count, _QUANTIZATION_BLOCKS),)](
        packed, state.code, state.absmax, nested.code, nested.absmax, state.offset, out, count,
        max(1, out.shape[1] // 64), spare,
        BLOCKS=_QUANTIZATION_BLOCKS, num_warps=_WARPS,
    )  # fmt: skip
    return out
