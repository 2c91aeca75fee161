"""RMS norm and gated activations: what Llama's family puts between its matrix products.

Each has a plain form here, and on a GPU with Triton one kernel (`gated_gpu.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kestrel.model.kernels.elementwise import kernels_for

Activation = Literal["silu", "gelu", "gelu_tanh"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * (weight + offset), row by row (Zhang and Sennrich, 2019). Arithmetic is in float32.

    Args:
        x: (rows, size), contiguous.
        weight: (size,).
        eps: added to the mean square.
        offset: added to the weight: 1 for Gemma, 0 for the others.

    Returns:
        The result, like x, and each row's 1 / rms, float32 (rows,).
    """
    kernels = kernels_for(x, "gated_gpu")
    if kernels is not None:
        return kernels.rms_norm(x, weight, eps, offset)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * inverse[:, None] * (weight.float() + offset)).to(x.dtype), inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: float, residual: Tensor
) -> Tensor:
    """Gradient of `rms_norm`'s input, plus `residual`: the gradient that reaches it by the residual connection."""
    kernels = kernels_for(x, "gated_gpu")
    if kernels is not None:
        return kernels.rms_norm_backward(grad, x, inverse, weight, offset, residual)
    scaled = grad.float() * (weight.float() + offset)
    normed = x.float() * inverse[:, None]
    along = (scaled * normed).mean(-1, keepdim=True)
    return ((scaled - normed * along) * inverse[:, None] + residual.float()).to(x.dtype)


def gated(both: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up (Shazeer, GLU variants, 2020).

    Args:
        both: (rows, 2 * width), contiguous: gate, then up.
        activation: of the gate.

    Returns:
        (rows, width).
    """
    kernels = kernels_for(both, "gated_gpu")
    if kernels is not None:
        return kernels.gated(both, activation)
    gate, up = both.chunk(2, dim=-1)
    return _activated(gate, activation) * up


def gated_backward_(grad: Tensor, both: Tensor, activation: Activation) -> None:
    """The gradient of `gated`'s input and, made again, its output; both in place.

    Args:
        grad: (rows, width), of the output; replaced by the output itself.
        both: (rows, 2 * width), the input; replaced by its gradient.
        activation: of the gate.
    """
    kernels = kernels_for(both, "gated_gpu")
    if kernels is not None:
        kernels.gated_backward_(grad, both, activation)
        return
    gate, up = both.chunk(2, dim=-1)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        active = _activated(leaf, activation)
    (of_gate,) = torch.autograd.grad(active, leaf, grad * up)
    active = active.detach()
    output = active * up
    up.copy_(grad * active)
    gate.copy_(of_gate)
    grad.copy_(output)


def _activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
