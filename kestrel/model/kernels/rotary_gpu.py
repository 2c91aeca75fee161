"""Rotary positions in Triton, for grouped heads and for rotations of a part of each head."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kestrel.model.kernels.sizes import power_of_two

_HEADS = 16  # at a time


@triton.jit
def _copy_heads(  # type: ignore[no-untyped-def]
    source, target, head_stride, heads, c, s, half, size,
    ROTATES: tl.constexpr, PARTIAL: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Copies the heads of one token; rotates the first 2 * half numbers of each."""
    place, whole = tl.arange(0, HALF)[None, :], tl.arange(0, SIZE)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        read, write = source + head * head_stride, target + head * size
        if ROTATES:
            there = (head < heads) & (place < half)
            low = tl.load(read + place, mask=there).to(tl.float32)
            high = tl.load(read + half + place, mask=there).to(tl.float32)
            tl.store(write + place, low * c - high * s, mask=there)
            tl.store(write + half + place, high * c + low * s, mask=there)
            if PARTIAL:
                rest = (head < heads) & (whole >= 2 * half) & (whole < size)
                tl.store(write + whole, tl.load(read + whole, mask=rest), mask=rest)
        else:
            there = (head < heads) & (whole < size)
            tl.store(write + whole, tl.load(read + whole, mask=there), mask=there)


# A length is sometimes a multiple of 16; compiling a second kernel for that would cost more than it saves.
@triton.jit(do_not_specialize=["length", "q_batch", "k_batch", "v_batch"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    query, key, value, cos, sin, out, length, heads, kv_heads, half, size, sign,
    q_batch, q_length, q_head, k_batch, k_length, k_head, v_batch, v_length, v_head,
    PARTIAL: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """One token a program, so that it may work in place."""
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    place = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + position * 2 * half + place, mask=place < half).to(tl.float32)
    s = tl.load(sin + position * 2 * half + place, mask=place < half).to(tl.float32) * sign
    target = out + token * (heads + 2 * kv_heads) * size
    _copy_heads(
        query + batch * q_batch + position * q_length, target, q_head, heads, c, s, half, size,
        True, PARTIAL, HALF, SIZE, HEADS,
    )  # fmt: skip
    _copy_heads(
        key + batch * k_batch + position * k_length, target + heads * size, k_head, kv_heads, c, s, half, size,
        True, PARTIAL, HALF, SIZE, KV_HEADS,
    )  # fmt: skip
    _copy_heads(
        value + batch * v_batch + position * v_length, target + (heads + kv_heads) * size, v_head, kv_heads, c, s, half,
        size, False, PARTIAL, HALF, SIZE, KV_HEADS,
    )  # fmt: skip


def rotate(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """As `elementwise.rotate`."""
    query, key, value = parts
    batch, length, heads, size = query.shape
    half, kv_heads = cos.shape[-1] // 2, key.shape[2]
    _rotate_kernel[(batch * length,)](
        query, key, value, cos, sin, out, length, heads, kv_heads, half, size, -1.0 if back else 1.0,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        PARTIAL=2 * half < size, HALF=power_of_two(half), SIZE=power_of_two(size),
        HEADS=min(_HEADS, power_of_two(heads)), KV_HEADS=min(_HEADS, power_of_two(kv_heads)),
        num_warps=4,
    )  # fmt: skip
