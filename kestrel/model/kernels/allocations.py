"""What the GPU kernels allocate, on the meta device: `planning/memory.py` counts it.

Each function takes and returns what its namesake in `elementwise_gpu.py` or `attention_gpu.py` does, without contents. A
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


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(state.shape, dtype=dtype)


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
