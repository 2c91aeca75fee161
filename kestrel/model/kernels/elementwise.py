"""The operations between the matrix products of a decoder layer: layer norm, dropout, GELU, and the likelihoods.

Each has a plain form here and, on a GPU with Triton, a kernel (`elementwise_gpu.py`) that reads and writes memory once
where separate operations would do so up to ten times.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels_for(x: Tensor, module: str = "elementwise_gpu") -> Any:
    """The module of kernels for this tensor's device, or None where the plain forms run."""
    if x.is_meta:
        from kestrel.model.kernels import allocations

        return allocations
    if not (x.is_cuda and _has_triton()):
        return None
    return importlib.import_module(f"kestrel.model.kernels.{module}")


def _kept(x: Tensor, p: float, seed: int) -> Tensor:
    """The dropout mask: 16 random bits per number, which is faster than a float; p is exact to 1 / 65536."""
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), 2**63 - 1, generator=generator)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits >= round(p * 65536) - 32768


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where kept, 0 elsewhere. The same seed gives the same mask, so none is stored."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.dropout(x, p, seed)
    return (x * _kept(x, p, seed)).mul_(1 / (1 - p))


def add_dropout_(total: Tensor, part: Tensor, p: float, seed: int) -> Tensor:
    """Adds `dropout(part, p, seed)` to `total`, in place."""
    kernels = kernels_for(total)
    if kernels is not None:
        return kernels.add_dropout_(total, part, p, seed)
    return total.addcmul_(part, _kept(part, p, seed), value=1 / (1 - p))


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), with the normal distribution's Φ and no approximation."""
    kernels = kernels_for(x)
    return F.gelu(x) if kernels is None else kernels.gelu(x)


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `gelu`'s input, written over its output's."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.gelu_backward_(grad, x)
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)


def nll(logits: Tensor, targets: Tensor, backward: bool) -> Tensor:
    """Negative log-likelihood of each row's target, in float32.

    Args:
        logits: (rows, vocabulary); overwritten, if `backward` with the gradient of each row's result.
        targets: int64 (rows,).
        backward: whether to compute the gradient.

    Returns:
        float32 (rows,), in nats.
    """
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.nll(logits, targets, backward)
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    columns = targets[:, None]
    result = -log_probabilities.gather(1, columns)[:, 0]
    if backward:
        gradient = log_probabilities.exp_()
        logits.copy_(gradient.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=torch.float32)))
    return result


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of the rows of (rows, size), and each row's mean and reciprocal deviation in float32."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.norm(x, weight, bias, eps)
    return torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)


def norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor, more: Tensor
) -> Tensor:
    """Gradient of `norm`'s input, plus `more`: its gradient through other paths."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.norm_backward(grad, x, mean, deviation, weight, more)
    backward = torch.ops.aten.native_layer_norm_backward
    result: Tensor = backward(grad, x, [x.shape[-1]], mean, deviation, weight, bias, [True, False, False])[0]
    return result.add_(more)
