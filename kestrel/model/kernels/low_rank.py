"""The products of a LoRA update's narrow side, with the dropout of their input made in passing.

In plain form the dropped input is made and multiplied. On a GPU with Triton (`low_rank_gpu.py`) it is never in memory:
each product reads its wide operand once, and draws the mask again from its seed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kestrel.model.kernels.elementwise import add_dropout_, dropout, kernels_for

_WIDEST = 256  # ranks that a kernel holds at once


def _kernels(x: Tensor, ranks: int) -> Any:
    return kernels_for(x, "low_rank_gpu") if ranks <= _WIDEST else None


def project(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """dropout(x) Aᵀ.

    Args:
        x: (tokens, inputs), contiguous.
        a: (ranks, inputs), of x's type.
        p: the share that is dropped; 0: none.
        seed: of the mask; the same seed drops the same in all three products here.

    Returns:
        (tokens, ranks).
    """
    if not p:
        return x @ a.t()
    kernels = _kernels(x, len(a))
    return dropout(x, p, seed) @ a.t() if kernels is None else kernels.project(x, a, p, seed)


def project_gradient(grad_low: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """The gradient of A: grad_lowᵀ dropout(x), (ranks, inputs). `grad_low`: (tokens, ranks), contiguous."""
    if not p:
        return grad_low.t() @ x
    kernels = _kernels(x, grad_low.shape[1])
    return grad_low.t() @ dropout(x, p, seed) if kernels is None else kernels.project_gradient(grad_low, x, p, seed)


def add_input_gradient_(grad_x: Tensor, grad_low: Tensor, a: Tensor, p: float, seed: int) -> None:
    """Adds to the gradient of x, in place, what comes by way of the update: dropout's gradient of grad_low A."""
    if not p:
        grad_x.addmm_(grad_low, a)
        return
    kernels = _kernels(grad_x, len(a))
    if kernels is None:
        add_dropout_(grad_x, grad_low @ a, p, seed)
    else:
        kernels.add_input_gradient_(grad_x, grad_low, a, p, seed)
