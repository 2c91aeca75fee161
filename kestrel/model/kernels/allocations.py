"""What the GPU kernels allocate, on the meta device: `planning/memory.py` counts it.

Each function takes and returns what its namesake in one of the `*_gpu.py` modules does, without contents. A
kernel that allocates something else must change here too; `tests/planning/test_memory.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_HEADS_PER_BLOCK = 8  # of `attention_gpu._OF_KEYS`


def rotate(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """Writes to `out`."""


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.empty_like(x)


def add_dropout_(total: Tensor, part: Tensor, p: float, seed: int) -> Tensor:
    return total


def gelu(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    return grad


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *x.new_empty(2, len(x), dtype=torch.float32)


def norm_backward(grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, more: Tensor) -> Tensor:
    return torch.empty_like(x)


def nll(logits: Tensor, targets: Tensor, backward: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


def dequantizes(state: Any) -> bool:
    return True


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    return packed.new_empty(state.shape, dtype=dtype) if out is None else out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)


def rms_norm_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: float, residual: Tensor
) -> Tensor:
    return torch.empty_like(x)


def gated(both: Tensor, activation: str) -> Tensor:
    return both.new_empty(len(both), both.shape[1] // 2)


def gated_backward_(grad: Tensor, both: Tensor, activation: str) -> None:
    """Writes to both."""


def project(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    return x.new_empty(len(x), len(a))


def project_gradient(grad_low: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    return x.new_empty(grad_low.shape[1], x.shape[1], dtype=torch.float32)


def add_input_gradient_(grad_x: Tensor, grad_low: Tensor, a: Tensor, p: float, seed: int) -> None:
    """Writes to `grad_x`."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(batch, length, heads, dtype=torch.float32)


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    groups = -(-query.shape[1] // _HEADS_PER_BLOCK)
    of_query, deltas = torch.empty_like(out), torch.empty_like(sums)
    partial = query.new_empty(groups, *out.shape[:2], 2, out.shape[3], dtype=torch.float32)
    del deltas
    return of_query, partial.sum(0).to(query.dtype)
