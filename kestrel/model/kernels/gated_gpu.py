"""The kernels of `gated.py` in Triton. Arithmetic is in float32 whatever is read and written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _rms_norm_kernel(x_of, weight_of, out, inverses, size, eps, offset, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < size
    x = tl.load(x_of + row * size + place, mask=there, other=0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    weight = tl.load(weight_of + place, mask=there).to(tl.float32) + offset
    tl.store(out + row * size + place, x * inverse * weight, mask=there)
    tl.store(inverses + row, inverse)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """As `gated.rms_norm`. Each program does one row."""
    rows, size = x.shape
    out, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows,)](x, weight, out, inverse, size, eps, offset, BLOCK=block, num_warps=_warps(block))
    return out, inverse


@triton.jit
def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_of, x_of, inverses, weight_of, residual_of, out, size, offset, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    there = place < size
    here = row * size + place
    inverse = tl.load(inverses + row)
    normed = tl.load(x_of + here, mask=there, other=0.0).to(tl.float32) * inverse
    grad = tl.load(grad_of + here, mask=there, other=0.0).to(tl.float32)
    grad *= tl.load(weight_of + place, mask=there, other=0.0).to(tl.float32) + offset
    result = (grad - normed * (tl.sum(grad * normed, axis=0) / size)) * inverse
    result += tl.load(residual_of + here, mask=there, other=0.0).to(tl.float32)
    tl.store(out + here, result, mask=there)


def rms_norm_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: float, residual: Tensor
) -> Tensor:
    """As `gated.rms_norm_backward`. Each program does one row."""
    rows, size = x.shape
    out, block = torch.empty_like(x), triton.next_power_of_2(size)
    _rms_norm_backward_kernel[(rows,)](
        grad, x, inverse, weight, residual, out, size, offset, BLOCK=block, num_warps=_warps(block)
    )
    return out


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4


@triton.jit
def _gated_kernel(both, grad, out, width, KIND: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < width
    gates, ups, here = both + row * 2 * width + place, both + row * 2 * width + width + place, row * width + place
    gate = tl.load(gates, mask=there, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=there, other=0.0).to(tl.float32)
    if KIND == 0:
        share = tl.sigmoid(gate)
        slope = share * (1 + gate * (1 - share))
    elif KIND == 1:
        # The normal distribution's tail: Abramowitz and Stegun, 7.1.26, within 1e-7; see `elementwise_gpu._gelu_kernel`.
        bell = tl.exp2(gate * gate * -0.7213475204444817)
        t = 1 / (1 + 0.2316418882663604 * tl.abs(gate))
        tail = (
            t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * bell
        )
        share = tl.where(gate < 0, tail, 1 - tail)
        slope = share + gate * bell * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        share = tl.sigmoid(2 * inner)  # (1 + tanh(inner)) / 2
        slope = share + gate * 2 * share * (1 - share) * 0.7978845608028654 * (1 + 0.134145 * gate * gate)
    active = gate * share
    if BACKWARD:
        of_output = tl.load(grad + here, mask=there, other=0.0).to(tl.float32)
        tl.store(gates, of_output * up * slope, mask=there)
        tl.store(ups, of_output * active, mask=there)
    tl.store(out + here, active * up, mask=there)


def gated(both: Tensor, activation: str) -> Tensor:
    """As `gated.gated`."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, width)
    grid = (rows, triton.cdiv(width, _BLOCK))
    _gated_kernel[grid](both, out, out, width, KIND=_KINDS[activation], BACKWARD=False, BLOCK=_BLOCK, num_warps=4)
    return out


def gated_backward_(grad: Tensor, both: Tensor, activation: str) -> None:
    """As `gated.gated_backward_`."""
    rows, width = grad.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    _gated_kernel[grid](both, grad, grad, width, KIND=_KINDS[activation], BACKWARD=True, BLOCK=_BLOCK, num_warps=4)
