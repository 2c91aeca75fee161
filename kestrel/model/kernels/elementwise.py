"""The operations between the matrix products of a decoder layer: norms, activations, rotation, likelihoods.

Each has a plain form here and, on a GPU with Triton, a kernel of the same name (`elementwise_gpu.py`, `rotary_gpu.py`) that
reads and writes memory once where separate operations would do so up to ten times.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]
P = ParamSpec("P")
R = TypeVar("R")


def place_of(x: Tensor) -> Literal["meta", "triton", "torch"]:
    """What computes on a tensor's device: nothing but shapes, Triton's kernels, or torch's operations."""
    if x.is_meta:
        return "meta"
    return "triton" if x.is_cuda and _has_triton() else "torch"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fused(
    module: str, allocates: Callable[..., Any], when: Callable[..., bool] = lambda *_, **__: True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a plain form whose place a kernel takes on a GPU.

    Args:
        module: beside this one, where the kernel has the same name and arguments; the first is a tensor, or some.
        allocates: what the kernel returns, without contents: `planning/memory.py` counts it on the meta device.
        when: whether the kernel computes these arguments.
    """

    def decorate(plain: Callable[P, R]) -> Callable[P, R]:
        @functools.cache
        def kernel() -> Callable[P, R]:
            found: Callable[P, R] = getattr(importlib.import_module(f"kestrel.model.kernels.{module}"), plain.__name__)
            return found

        @functools.wraps(plain)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            first: Any = args[0]
            place = place_of(first if isinstance(first, Tensor) else first[0])
            if place == "torch" or not when(*args, **kwargs):
                return plain(*args, **kwargs)
            if place == "meta":
                return allocates(*args, **kwargs)
            return kernel()(*args, **kwargs)

        return run

    return decorate


def _activated(x: Tensor, activation: Activation) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate=_approximation(activation))


def _approximation(activation: Activation) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def _allocated_by_activate(before: Tensor, activation: Activation, gated: bool, spare: int = 0) -> Tensor:
    width = before.shape[1] >> gated
    return before.new_empty(len(before), width + spare)[:, :width]


@fused("elementwise_gpu", _allocated_by_activate)
def activate(before: Tensor, activation: Activation, gated: bool, spare: int = 0) -> Tensor:
    """activation(before); with a gate activation(gate) * up (Shazeer, GLU variants, 2020).

    Args:
        before: (rows, width), contiguous; with a gate (rows, 2 * width): gate, then up.
        activation: its gelu is exact.
        gated: whether there is a gate.
        spare: as in `norm`.

    Returns:
        (rows, width).
    """
    if not gated:
        return _activated(before, activation)
    gate, up = before.chunk(2, dim=-1)
    return _activated(gate, activation) * up


@fused("elementwise_gpu", allocates=lambda grad, before, activation, gated, output: None)
def activate_backward_(grad: Tensor, before: Tensor, activation: Activation, gated: bool, output: bool) -> None:
    """The gradient of `activate`'s input and, made again if `output`, its output; both in place.

    Args:
        grad: (rows, width), of the output; replaced by the output itself. Its rows may lie apart.
        before: the input, contiguous; replaced by its gradient.
        activation, gated: as given to `activate`.
        output: whether the output is wanted; otherwise `grad` is left without meaning.
    """
    result = activate(before, activation, gated) if output else None
    gate, up = before.chunk(2, dim=-1) if gated else (before, None)
    of_gate = grad if up is None else grad * up
    if up is not None:
        up.copy_(grad * _activated(gate, activation))
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=gate)
    else:
        approximation = _approximation(activation)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, approximate=approximation, grad_input=gate)
    if result is not None:
        grad.copy_(result)


@fused(
    "elementwise_gpu", allocates=lambda logits, targets, backward: logits.new_empty(len(logits), dtype=torch.float32)
)
def nll(logits: Tensor, targets: Tensor, backward: bool) -> Tensor:
    """Negative log-likelihood of each row's target, in float32.

    Args:
        logits: (rows, vocabulary); overwritten, if `backward` with the gradient of each row's result.
        targets: int64 (rows,).
        backward: whether to compute the gradient.

    Returns:
        float32 (rows,), in nats.
    """
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    columns = targets[:, None]
    result = -log_probabilities.gather(1, columns)[:, 0]
    if backward:
        gradient = log_probabilities.exp_()
        logits.copy_(gradient.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=torch.float32)))
    return result


def _allocated_by_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float = 0.0, spare: int = 0
) -> tuple[Tensor, Sequence[Tensor]]:
    statistics = x.new_empty(1 if bias is None else 2, len(x), dtype=torch.float32)
    return x.new_empty(len(x), x.shape[1] + spare)[:, : x.shape[1]], statistics.unbind()


@fused("elementwise_gpu", _allocated_by_norm)
def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float = 0.0, spare: int = 0
) -> tuple[Tensor, Sequence[Tensor]]:
    """Layer norm of each row, or without a bias RMS norm (Zhang and Sennrich, 2019). Arithmetic is in float32.

    Args:
        x: (rows, size), contiguous.
        weight, bias: (size,).
        eps: added to the variance, or to the mean square.
        offset: added to an RMS norm's weight: 1 for Gemma.
        spare: columns of memory behind each row of the result, which `projection.Group` may fill; the plain form leaves none.

    Returns:
        The result, of x's shape, and what `norm_backward` needs of each row, in float32: mean and reciprocal deviation, or 1 / rms.
    """
    if bias is not None:
        out, *statistics = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
        return out, statistics
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * inverse[:, None] * (weight.float() + offset)).to(x.dtype), (inverse,)


@fused("elementwise_gpu", allocates=lambda grad, x, *_: torch.empty_like(x))
def norm_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    offset: float,
    more: Tensor,
) -> Tensor:
    """Gradient of `norm`'s input, plus `more`: the gradient that reaches it by the residual connection.

    All are contiguous, but that the rows of `grad` may lie apart.
    """
    if bias is not None:
        backward = torch.ops.aten.native_layer_norm_backward
        mask = [True, False, False]
        result: Tensor = backward(grad, x, [x.shape[-1]], *statistics, weight, bias, mask)[0]
        return result.add_(more)
    inverse = statistics[0][:, None]
    scaled, normed = grad.float() * (weight.float() + offset), x.float() * inverse
    along = (scaled * normed).mean(-1, keepdim=True)
    return ((scaled - normed * along) * inverse + more.float()).to(x.dtype)


@fused("rotary_gpu", allocates=lambda parts, cos, sin, out, back: None)
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
    cos, sin = cos[:, None, :half], sin[:, None, :half] * (-1 if back else 1)
    for place, source in ((out[:, :, :heads], query), (out[:, :, heads : heads + kv_heads], key)):
        low, high = source[..., :half], source[..., half : 2 * half]
        turned = high * cos + low * sin
        torch.sub(low * cos, high * sin, out=place[..., :half])
        place[..., half : 2 * half] = turned
        if 2 * half < size:
            place[..., 2 * half :] = source[..., 2 * half :]
    out[:, :, heads + kv_heads :] = value


def _reads(packed: Tensor, state: Any, *_: Any) -> bool:
    """Whether the kernel reads this layout: bitsandbytes' nested 4-bit blocks."""
    second = state.state2 if state.nested else None
    known = second is not None and second.blocksize == 256 and state.blocksize == 64
    return packed.is_meta or (known and state.shape.numel() % 64 == 0)


def _allocated_by_dequantize(packed: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    return packed.new_empty(state.shape, dtype=dtype) if out is None else out


@fused("elementwise_gpu", _allocated_by_dequantize, when=_reads)
def dequantize(packed: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Dense (outputs, inputs) weights of bitsandbytes' packed 4-bit ones; written into `out`, where it is given.

    Args:
        packed, state: as bitsandbytes holds them.
        dtype: of the result.
        out: of that shape and type. Its rows may lie apart, by some 16 numbers, if they are of some 64.
    """
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(packed, state).to(dtype)
    return dense if out is None else out.copy_(dense)
