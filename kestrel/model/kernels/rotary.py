"""Rotary positions of queries and keys, for grouped heads and for rotations of a part of each head.

There is a plain form here, and on a GPU with Triton one kernel (`rotary_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kestrel.model.kernels.elementwise import kernels_for


def rotate(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """Rotates queries and keys by their positions and lays them beside the values (Su and others, RoFormer, 2021).

    Args:
        parts: queries (batch, length, heads, size), keys and values (batch, length, key/value heads, size), each with a
            last stride of 1.
        cos, sin: (length, rotated), whose second half repeats the first; rotated <= size, the rest of a head is left.
        out: contiguous (batch, length, heads + 2 * key/value heads, size), filled with queries, keys and values. The
            inputs may be views of it.
        back: rotate the other way, which is what the gradients need.
    """
    query, key, value = parts
    heads, kv_heads, size, half = query.shape[2], key.shape[2], out.shape[-1], cos.shape[-1] // 2
    kernels = kernels_for(out, "rotary_gpu")
    if kernels is not None:
        kernels.rotate(parts, cos, sin, out, back)
        return
    cos, sin = cos[:, None, :half], sin[:, None, :half] * (-1 if back else 1)
    for place, source in ((out[:, :, :heads], query), (out[:, :, heads : heads + kv_heads], key)):
        low, high = source[..., :half], source[..., half : 2 * half]
        turned = high * cos + low * sin
        torch.sub(low * cos, high * sin, out=place[..., :half])
        place[..., half : 2 * half] = turned
        if 2 * half < size:
            place[..., 2 * half :] = source[..., 2 * half :]
    out[:, :, heads + kv_heads :] = value
