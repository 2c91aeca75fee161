"""The products of a LoRA update's narrow side, with the dropout of their input made in passing.

In plain form the dropped input is made and multiplied. On a GPU since Ampere with Triton (`low_rank_gpu.py`) it is never in
memory: each product reads its wide operand once, and draws the mask again from its seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kestrel.model.kernels import cards
from kestrel.model.kernels.elementwise import fused


def _drops(*arguments: Any) -> bool:
    """Whether a product drops something and the kernels' products are fast on this card."""
    p, _ = arguments[-2:]
    return p > 0 and not cards.is_before_ampere()


def _kept(x: Tensor, p: float, seed: int) -> Tensor:
    """The dropout mask: 16 random bits per number, which is faster than a float; p is exact to 1 / 65536."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    if not x.is_meta:
        words.random_(-(2**63), 2**63 - 1, generator=torch.Generator(x.device).manual_seed(seed))
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits >= round(p * 65536) - 32768


def in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b, added up and returned in float32: gradients under float16's loss scale may exceed its range."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where kept, 0 elsewhere. The same seed gives the same mask, so none is stored."""
    return (x * _kept(x, p, seed)).mul_(1 / (1 - p))


@fused("low_rank_gpu", lambda x, a, *_: x.new_empty(len(x), len(a)), when=_drops)
def project(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """dropout(x) Aᵀ.

    Args:
        x: (tokens, inputs); its rows may lie apart.
        a: (ranks, inputs), of x's type.
        p: the share that is dropped; 0: none.
        seed: of the mask; the same seed drops the same in all three products here.

    Returns:
        (tokens, ranks).
    """
    return (dropout(x, p, seed) if p else x) @ a.t()


@fused(
    "low_rank_gpu",
    lambda low, x, *_: x.new_empty(low.shape[1], x.shape[1], dtype=torch.float32),
    when=_drops,
)
def project_gradient(grad_low: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """The gradient of A: grad_lowᵀ dropout(x), float32 (ranks, inputs). `grad_low`: (tokens, ranks), contiguous."""
    return in_float32(grad_low.t(), dropout(x, p, seed) if p else x)


@fused("low_rank_gpu", lambda *_: None, when=_drops)
def add_input_gradient_(grad_x: Tensor, grad_low: Tensor, a: Tensor, p: float, seed: int) -> None:
    """Adds to the gradient of x, in place, what comes by way of the update: dropout's gradient of grad_low A.

    Args:
        grad_x: (tokens, inputs); its rows may lie apart.
        grad_low: (tokens, ranks), contiguous.
        a, p, seed: as given to `project`.
    """
    if p:
        grad_x.addcmul_(grad_low @ a, _kept(grad_x, p, seed), value=1 / (1 - p))
    else:
        grad_x.addmm_(grad_low, a)
