"""Falcon's attention on the fast kernels.

Falcon has many query heads and one key/value head, and transformers hands both to `scaled_dot_product_attention` as
they are. No fused kernel takes unequal numbers of heads without being told, so torch falls back to plain matrix
products that hold every attention score in memory: on one H200 a training step is 1.4 times slower and needs twice the
memory. Repeating the one head as a view, without copying it, gives every kernel what it takes. The result is the same.

Of the fused kernels cuDNN's is the fastest on recent GPUs, but for every new shape it first makes a plan, which took 50 ms
for the forward and 50 ms for the backward pass on an H200, and dialogues bring a new shape with every pass. So it is used
only where the passes before keep the GPU busy for so long that nobody waits for the plan.

For torch 2.11 to 2.13 and transformers 5.17 to 5.23; `test_stock_falcon_misses_the_fused_kernel` fails when it is no
longer needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_BLOCK = 96  # queries that meet the same keys
_LARGE = 8192  # tokens in a pass: 0.4 s on an H200
_ALL_KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip

_stock = F.scaled_dot_product_attention


def _with_repeated_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As torch's function; a single key/value head is seen by every query head.

    Where each head has one query, as in generation, the heads are as many queries of one head: the keys are then read
    once and not once a head.

    Args:
        query: (batch, heads, queries, head size).
        key, value: (batch, heads or 1, keys, head size).
    """
    if key.dim() == 4 and key.shape[1] == 1 and query.shape[1] > 1:
        if query.shape[2] == 1 and not args and not kwargs.get("is_causal"):
            mask = kwargs.pop("attn_mask", None)
            mask = mask.transpose(1, 2) if mask is not None and mask.dim() == 4 else mask
            return _stock(query.transpose(1, 2), key, value, attn_mask=mask, **kwargs).transpose(1, 2)
        key, value = (t.expand(-1, query.shape[1], -1, -1) for t in (key, value))
    return _stock(query, key, value, *args, **kwargs)


def use_fused_kernels(model_type: str) -> None:
    """Lets attention take the fused kernels that suit dialogues, for the rest of the process."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    if model_type == "falcon":
        F.scaled_dot_product_attention = _with_repeated_heads


def kernels_for(tokens: int) -> AbstractContextManager[None]:
    """Allows cuDNN's kernel meanwhile, if a pass has so many tokens that its plan is made while the GPU is busy."""
    return sdpa_kernel(_ALL_KERNELS) if tokens >= _LARGE and torch.cuda.is_available() else nullcontext()


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of many query heads to one key/value head, as `scaled_dot_product_attention` computes it.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, 1, length, head size).

    Returns:
        (batch, heads, length, head size).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _by_blocks(query.transpose(1, 2), key[:, 0], value[:, 0]).transpose(1, 2)
    if query.is_cuda and not __import__("os").environ.get("SDPA"):
        from kestrel import attention_gpu

        if attention_gpu.computes(query):
            out: torch.Tensor = attention_gpu.CausalAttention.apply(query, key, value)
            return out
    every = (-1, query.shape[1], -1, -1)
    return F.scaled_dot_product_attention(query, key.expand(every), value.expand(every), is_causal=True)


def _by_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same as plain products, for CPUs, whose kernel for bfloat16 is slower than these.

    All heads are rows of one matrix, and a block of queries meets no key behind its last one.

    Args:
        query: (batch, length, heads, head size).
        key, value: (batch, length, head size).
    """
    batch, length, heads, size = query.shape
    outputs = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        rows = query[:, start:end].reshape(batch, -1, size) * size**-0.5
        scores = torch.bmm(rows, key[:, :end].transpose(1, 2)).view(batch, end - start, heads, end)
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)[:, None]
        scores[..., start:].masked_fill_(later, float("-inf"))
        weights = scores.softmax(dim=-1).view(batch, -1, end)
        outputs.append(torch.bmm(weights, value[:, :end]).view(batch, end - start, heads, size))
    return torch.cat(outputs, dim=1)


@contextmanager
def stock_attention() -> Iterator[None]:
    """torch's own function while the block runs, to compare with."""
    former = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _stock
    try:
        yield
    finally:
        F.scaled_dot_product_attention = former
