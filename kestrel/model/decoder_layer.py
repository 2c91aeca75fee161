"""Decoder layers written for training a LoRA adapter over a frozen base, for the architectures of `architecture.py`.

What is frozen needs no gradient, so little must be kept for the backward pass: of each layer its input, the input of its
MLP, the attention's inputs and output, and the MLP before its activation. Norms, activations, dropout and the dense form
of the 4-bit weights are made again when they are needed. Against transformers' layers under autograd that is less than
half the memory, no copy in float32 of what goes into LoRA, and half the passes over memory between the matrix products.

The first layer's products of the input depend on the token alone, not on its position, so each distinct token of a batch
is multiplied once. Of the last layer only what predicts a supervised token is computed.

A layer computes what transformers' layer computes (5.17 to 5.23), for rows padded on the right:

    parallel:    n = norm(x);  y = x + output(attention(n)) + down(activation(up(n)))
    sequential:  m = x + output(attention(norm(x)));  y = m + down(activation(gate(n)) * up(n)),  n = norm(m)

In some sequential layers, what `output` and `down` make is normed before it is added.

`tests/model/test_fast_layers.py` holds it against transformers' and PEFT's layers: outputs and LoRA gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kestrel.model.architecture import Architecture
from kestrel.model.kernels.attention import attend
from kestrel.model.kernels.elementwise import activate, activate_backward_, norm, norm_backward, rotate
from kestrel.model.projection import Group, Repeats

Recompute = Literal["dense", "none", "mlp", "full"]
# Called as `attend` is, in its place.
Attending: TypeAlias = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


class _Norm:
    """A frozen layer norm or RMS norm."""

    def __init__(self, module: Any, architecture: Architecture):
        self._weight, self._bias, self._offset = module.weight, getattr(module, "bias", None), architecture.offset
        eps = [getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)]
        self._eps = float(eps[0])

    def forward(self, x: Tensor, groups: Sequence[Group] = ()) -> tuple[Tensor, Sequence[Tensor]]:
        """Normed x, (rows, size), with the memory behind its rows that groups ask for; and what `backward` needs of each."""
        spare = max((group.spare for group in groups), default=0)
        return norm(x, self._weight, self._bias, self._eps, self._offset, spare)

    def backward(self, grad: Tensor, x: Tensor, statistics: Sequence[Tensor], residual: Tensor) -> Tensor:
        """The gradient of x, plus that which reaches x by the residual connection."""
        return norm_backward(grad, x, statistics, self._weight, self._bias, self._offset, residual)


class Layer:
    """The parts of one decoder layer."""

    def __init__(self, layer: nn.Module, architecture: Architecture, window: int | None, recompute: Recompute):
        def group(names: tuple[str, ...], has_room: bool = False) -> Group:
            return Group([layer.get_submodule(name) for name in names], has_room)

        self.architecture, self.window, self.recompute = architecture, window, recompute
        self.input_norm = _Norm(layer.get_submodule(architecture.input_norm), architecture)
        name = architecture.mlp_norm
        self.mlp_norm = _Norm(layer.get_submodule(name), architecture) if name else None
        after = (architecture.output_norm, architecture.down_norm)
        self.output_norm, self.down_norm = (_Norm(layer.get_submodule(n), architecture) if n else None for n in after)
        self.qkv, self.output = group(architecture.qkv, has_room=True), group((architecture.output,))
        self.up, self.down = group(architecture.gate_up, has_room=True), group((architecture.down,), has_room=True)
        self.after_input_norm = (self.qkv,) if self.mlp_norm else (self.qkv, self.up)
        names = (architecture.query_norm, architecture.key_norm)
        self._head_norms = [layer.get_submodule(name) for name in names if name]
        # Makes the weights whole where the base is sharded.
        self.gather: Callable[[], None] = getattr(layer, "gather_weights", lambda: None)

    def matrices(self) -> list[nn.Parameter]:
        """A and B of each LoRA update, in the order of the gradients that `DecoderLayer` returns."""
        return [matrix for group in self.groups() for matrix in group.matrices()]

    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.output, self.up, self.down

    def adapts_mlp(self) -> bool:
        return bool(self.up.updates or self.down.updates)

    def activate(self, before: Tensor) -> Tensor:
        return activate(before, self.architecture.activation, self.architecture.gated, self.down.spare)

    def attention(
        self,
        normed: Tensor,
        shape: torch.Size,
        cos: Tensor,
        sin: Tensor,
        seed: int,
        repeats: Repeats | None,
        attending: Attending | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Attention, with a graph from its result to its inputs.

        Args:
            normed: (tokens, hidden).
            shape: batch, length, hidden.
            cos, sin: (length, rotated numbers of a head).
            seed: of the dropout of queries, keys and values.
            repeats: which rows of `normed` are equal.
            attending: what makes the result of queries, keys and values; then there is no graph. None: `attend`.

        Returns:
            The result (batch, heads, length, head size), and the leaves of its graph: queries, keys and values, rotated;
            or, where queries and keys are normed, what the linear layers made, (batch, length, all heads, head size).
            And the narrow side of the linear layers' updates.
        """
        a = self.architecture
        heads = (a.heads, a.kv_heads, a.kv_heads)
        made, low = self.qkv.forward(normed, seed, repeats=repeats)
        fused = made.view(*shape[:2], sum(heads), a.head_size)
        if self._head_norms:
            with torch.set_grad_enabled(attending is None):
                leaf = fused.detach().requires_grad_()
                query, key, value = (part.transpose(1, 2) for part in leaf.split(heads, dim=2))
                query, key = (
                    _rotated(module(part), cos, sin)
                    for module, part in zip(self._head_norms, (query, key), strict=True)
                )
                query = query if a.query_scale == 1 else query * a.query_scale
                return [(attending or attend)(query, key, value, self.window), leaf], low
        parts = fused.split(heads, dim=2)
        rotate(parts, cos, sin, out=fused, back=False)
        with torch.set_grad_enabled(attending is None):
            query, key, value = (part.transpose(1, 2).detach().requires_grad_() for part in parts)
            return [(attending or attend)(query, key, value, self.window), query, key, value], low

    def joined_gradient(self, grads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
        """The gradients of the leaves that `attention` returned, as that of what the linear layers made: (tokens, outputs)."""
        if self._head_norms:
            return grads[0].flatten(0, 1).flatten(1)
        parts = [grad.transpose(1, 2) for grad in grads]
        a = self.architecture
        fused = parts[0].new_empty(*parts[0].shape[:2], a.heads + 2 * a.kv_heads, a.head_size)
        rotate(parts, cos, sin, out=fused, back=True)
        return fused.flatten(0, 1).flatten(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in plain operations, for heads (batch, heads, length, size)."""
    half = cos.shape[-1] // 2
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :half], sin[:, :half]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


class DecoderLayer(torch.autograd.Function):
    """One layer as one step of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        wanted: Tensor | None,
        repeats: Repeats | None,
        attending: Attending | None,
        layer: Layer,
        seed: int,
        *matrices: Any,
    ) -> Tensor:
        """The layer's output.

        Args:
            ctx: of autograd.
            x: (batch, length, hidden), in the compute type.
            cos, sin: (length, rotated numbers of a head), in the compute type.
            wanted: int64 (wanted,), rows of the flattened batch; the others are computed as far as attention needs them.
                None: all.
            repeats: which rows of the flattened x are equal; None: unknown.
            attending: as of `Layer.attention`, where there is no backward pass to come.
            layer: its parts.
            seed: of the dropout masks.
            matrices: float32, the layer's LoRA matrices, so that autograd sees them.

        Returns:
            (batch, length, hidden), or (wanted, hidden) where rows are named.
        """
        layer.gather()
        flat = x.flatten(0, 1)
        normed, _ = layer.input_norm.forward(flat, layer.after_input_norm)
        attention, low_qkv = layer.attention(normed, x.shape, cos, sin, seed, repeats, attending)
        merged = _rows(_merged(attention[0].detach()), wanted)
        if layer.mlp_norm is None:
            middle = made = by_mlp = None
            if repeats is not None and not layer.adapts_mlp():
                before, low_up = layer.up.forward(repeats.distinct(normed), seed + 2)
                y, low_down = layer.down.forward(layer.activate(before), seed + 3)
                y = repeats.spread(y).add_(flat)
            else:
                before, low_up = layer.up.forward(_rows(normed, wanted), seed + 2)
                y, low_down = layer.down.forward(layer.activate(before), seed + 3, plus=_rows(flat, wanted))
            y, low_output = layer.output.forward(merged, seed + 1, plus=y)
        else:
            middle, made, low_output = _added(layer.output, merged, seed + 1, _rows(flat, wanted), layer.output_norm)
            del normed, merged
            normed, _ = layer.mlp_norm.forward(middle, (layer.up,))
            before, low_up = layer.up.forward(normed, seed + 2)
            y, by_mlp, low_down = _added(layer.down, layer.activate(before), seed + 3, middle, layer.down_norm)
        needs_mlp = layer.mlp_norm is not None or ctx.needs_input_grad[0] or layer.adapts_mlp()
        keeps_middle = layer.recompute != "full"
        by_attention = (middle, made, by_mlp, low_qkv) if keeps_middle else [None] * 4
        by_up = (before, low_up) if layer.recompute in ("dense", "none") and needs_mlp else [None] * 2
        ctx.save_for_backward(x, cos, sin, wanted, *by_attention, *by_up, low_output, low_down)
        ctx.layer, ctx.seed, ctx.needs_mlp, ctx.repeats = layer, seed, needs_mlp, repeats
        ctx.attention = attention if keeps_middle else None
        return y.view_as(x) if wanted is None else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, cos, sin, wanted, middle, made, by_mlp, low_qkv, before, low_up, low_output, low_down = ctx.saved_tensors
        layer, seed, attention = ctx.layer, ctx.seed, ctx.attention
        layer.gather()
        ctx.attention = None
        needs_x = ctx.needs_input_grad[0]  # not below the first layer: the embedding is frozen
        flat = x.flatten(0, 1)
        grad = grad_y.flatten(0, 1) if wanted is None else grad_y.contiguous()
        normed, statistics = layer.input_norm.forward(flat, layer.after_input_norm)
        if attention is None:
            attention, low_qkv = layer.attention(normed, x.shape, cos, sin, seed, ctx.repeats)
        merged = _rows(_merged(attention[0].detach()), wanted)

        of_mlp: list[Any] = [None] * len([*layer.up.matrices(), *layer.down.matrices()])
        grad_normed = None  # of the input norm, by way of a parallel MLP
        if layer.mlp_norm is None:
            if ctx.needs_mlp:
                some = _rows(normed, wanted)
                grad_some, of_mlp = _mlp_backward(layer, grad, some, before, None, (low_up, low_down), seed)
                grad_normed = _all_rows(grad_some, wanted, len(flat)) if needs_x else None
                del some, grad_some
        else:
            if middle is None:
                middle, made, _ = _added(layer.output, merged, seed + 1, _rows(flat, wanted), layer.output_norm)
            mlp_normed, mlp_statistics = layer.mlp_norm.forward(middle, (layer.up,))
            grad_mlp, of_mlp = _mlp_backward(layer, grad, mlp_normed, before, by_mlp, (low_up, low_down), seed)
            del mlp_normed
            grad = layer.mlp_norm.backward(grad_mlp, middle, mlp_statistics, grad)
            del grad_mlp, middle
        del before

        grad_made = _before_norm(layer.output_norm, grad, made)
        grad_out, of_output = layer.output.backward(grad_made, merged, low_output, seed + 1)
        del merged, made, grad_made
        a = layer.architecture
        grad_out = _all_rows(grad_out, wanted, len(flat)).view(*x.shape[:2], a.heads, a.head_size).transpose(1, 2)
        out, *leaves = attention
        grads = torch.autograd.grad(out, leaves, grad_out)
        del attention, out, leaves, grad_out
        grad_fused = layer.joined_gradient(grads, cos, sin)
        del grads
        grad_x = None
        if needs_x:
            grad_normed, of_qkv = layer.qkv.backward(grad_fused, normed, low_qkv, seed, onto=grad_normed)
            grad_x = layer.input_norm.backward(grad_normed, flat, statistics, _all_rows(grad, wanted, len(flat)))
            grad_x = grad_x.view_as(x)
        else:
            of_qkv = layer.qkv.backward_updates(grad_fused, None, normed, low_qkv, seed)
        return (grad_x, *[None] * 7, *of_qkv, *of_output, *of_mlp)


def _mlp_backward(
    layer: Layer,
    grad: Tensor,
    normed: Tensor,
    before: Tensor | None,
    made: Tensor | None,
    lows: tuple[Tensor | None, Tensor | None],
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the MLP's input, and of its LoRA matrices.

    Args:
        layer: whose MLP it is.
        grad: (rows, hidden), of its output.
        normed: (rows, hidden), its input.
        before: (rows, widths of gate and up), what its activation is applied to; None: it is made again. It is consumed.
        made: (rows, hidden), what its last layer made, where a norm follows; None: it is made again.
        lows: (rows, ranks), the narrow sides of `up`, which is made again with `before`, and of `down`.
        seed: of the layer's dropout masks.
    """
    low_up, low_down = lows
    if before is None:
        before, low_up = layer.up.forward(normed, seed + 2)
    if layer.down_norm is not None and made is None:
        made, _ = layer.down.forward(layer.activate(before), seed + 3)
    grad = _before_norm(layer.down_norm, grad, made)
    del made
    grad_inner, grad_low = layer.down.backward_input(grad, seed + 3)
    a, needs_inner = layer.architecture, bool(layer.down.updates)
    activate_backward_(grad_inner, before, a.activation, a.gated, output=needs_inner)
    inner, grad_before = grad_inner if needs_inner else None, before
    del grad_inner, before
    of_down = layer.down.backward_updates(grad, grad_low, inner, low_down, seed + 3)
    del inner
    grad_normed, of_up = layer.up.backward(grad_before, normed, low_up, seed + 2)
    return grad_normed, [*of_up, *of_down]


def _added(
    group: Group, x: Tensor, seed: int, plus: Tensor, norm_after: _Norm | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a group makes of x, normed where a norm follows, plus `plus`; what it makes, if normed; and the narrow side."""
    made, low = group.forward(x, seed, plus=plus if norm_after is None else None)
    if norm_after is None:
        return made, None, low
    return norm_after.forward(made)[0].add_(plus), made, low


def _before_norm(norm_after: _Norm | None, grad: Tensor, made: Tensor | None) -> Tensor:
    """The gradient of what `_added` normed, from that of the sum."""
    if norm_after is None or made is None:
        return grad
    return norm_after.backward(grad, made, norm_after.forward(made)[1], torch.zeros_like(grad))


def _rows(x: Tensor, wanted: Tensor | None) -> Tensor:
    """The wanted rows; all of them as they are."""
    return x if wanted is None else x.index_select(0, wanted)


def _all_rows(x: Tensor, wanted: Tensor | None, count: int) -> Tensor:
    """The wanted rows in their places, among zeros."""
    return x if wanted is None else x.new_zeros(count, x.shape[1]).index_copy_(0, wanted, x)


def _merged(out: Tensor) -> Tensor:
    """(batch, heads, length, size) → (tokens, hidden)."""
    return out.transpose(1, 2).flatten(0, 1).flatten(1)
