"""Falcon-7B's decoder layer, written for training a LoRA adapter over a frozen base.

Frozen weights need no gradient, so the backward pass needs little: each layer keeps its input, the attention's inputs and
output, and the MLP before its activation. Norms, activations, dropout and dense 4-bit weights are recomputed. Compared
with transformers' layers under autograd this takes a third less memory, makes no float32 copy of LoRA's input, and passes
over memory half as often between the matrix products.

The first layer's products depend on the token alone, not on its position, so each distinct token of a batch is multiplied
once. The last layer computes only the rows that predict a supervised token.

The layer computes what transformers' layer computes (5.17 to 5.23), for rows padded on the right:

    n = norm(x);   y = x + dense(attention(rotary(qkv(n)))) + down(gelu(up(n)));   each W n + (alpha / r) B A dropout(n)

`tests/model/test_falcon.py` compares the two: outputs and LoRA gradients agree within rounding.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kestrel.model.kernels.attention import causal_attention
from kestrel.model.kernels.elementwise import (
    DenseWeight,
    add_dropout_,
    dropout,
    gelu,
    gelu_backward_,
    norm,
    norm_backward,
    rotate,
)

Recompute = Literal["none", "mlp", "full"]
_PROJECTIONS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


class Repeats(NamedTuple):
    """Which positions of a flattened batch hold the same token.

    Attributes:
        first: int64 (distinct tokens,), one position of each.
        which: int64 (tokens,), for each position the index of its token in `first`.
    """

    first: Tensor
    which: Tensor


# -- one linear layer --------------------------------------------------------------------------------------------------


class _Projection:
    """A frozen linear layer with or without a LoRA update. Activations are (tokens, features) in the compute type."""

    def __init__(self, module: Any):
        self.module = module
        self._weight = DenseWeight(module.get_base_layer() if hasattr(module, "get_base_layer") else module)
        self._a: nn.Parameter | None = None
        self._b: nn.Parameter | None = None
        if hasattr(module, "lora_A"):
            (name,) = module.active_adapters
            self._a, self._b = module.lora_A[name].weight, module.lora_B[name].weight
            self._scaling, self._dropout = float(module.scaling[name]), module.lora_dropout[name]

    def adapter(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """A (r, in) and B (out, r) in float32, or None and None without an update or where it is switched off."""
        return (None, None) if self._a is None or self.module.disable_adapters else (self._a, self._b)

    def _p(self) -> float:
        return float(self._dropout.p) if isinstance(self._dropout, nn.Dropout) and self._dropout.training else 0.0

    def _dropped(self, x: Tensor, seed: int) -> Tensor:
        return dropout(x, self._p(), seed) if self._p() else x

    def forward(self, x: Tensor, seed: int, onto: Tensor | None = None, repeats: Repeats | None = None) -> Tensor:
        """(tokens, in) → (tokens, out); added in place to `onto` where given. With `repeats`, equal rows are multiplied once."""
        weight = self._weight(x.dtype).t()
        if repeats is not None:
            y = _rows(_rows(x, repeats.first) @ weight, repeats.which)
        else:
            y = x @ weight if onto is None else onto.addmm_(x, weight)
        a, b = self.adapter()
        if a is not None and b is not None:
            low = self._dropped(x, seed) @ a.to(x.dtype).t()
            y.addmm_(low, b.to(x.dtype).t(), alpha=self._scaling)
        return y

    def backward(
        self, grad: Tensor, x: Tensor | None, seed: int, onto: Tensor | None = None, needs_input: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the input (added in place to `onto` where given), of A and of B. Only LoRA needs `x`."""
        grad_x = onto
        if needs_input:
            weight = self._weight(grad.dtype)
            grad_x = grad @ weight if onto is None else onto.addmm_(grad, weight)
        matrices = self.adapter()
        if matrices[0] is None or matrices[1] is None:
            return grad_x, None, None
        assert x is not None
        a, b = (matrix.to(grad.dtype) for matrix in matrices if matrix is not None)
        dropped = self._dropped(x, seed)
        grad_low = grad @ b * self._scaling
        grad_b = (grad.t() @ (dropped @ a.t())).to(matrices[1].dtype) * self._scaling
        grad_a = (grad_low.t() @ dropped).to(matrices[0].dtype)
        if needs_input:
            assert grad_x is not None
            if self._p():
                add_dropout_(grad_x, grad_low @ a, self._p(), seed)
            else:
                grad_x.addmm_(grad_low, a)
        return grad_x, grad_a, grad_b


# -- one layer ---------------------------------------------------------------------------------------------------------


class _Layer:
    """One decoder layer's projections and norm."""

    def __init__(self, layer: nn.Module, heads: int, recompute: Recompute):
        parts = (_Projection(layer.get_submodule(name)) for name in _PROJECTIONS)
        self.qkv, self.dense, self.up, self.down = parts
        self._norm: Any = layer.input_layernorm
        self._heads = heads
        self.recompute = recompute

    def adapters(self) -> list[nn.Parameter | None]:
        return [matrix for part in (self.qkv, self.dense, self.up, self.down) for matrix in part.adapter()]

    def adapts_mlp(self) -> bool:
        return self.up.adapter()[0] is not None or self.down.adapter()[0] is not None

    def norm(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed x (tokens, hidden), and float32 mean and reciprocal deviation of each row (tokens,)."""
        return norm(x, self._norm.weight, self._norm.bias, self._norm.eps)

    def norm_backward(self, grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, more: Tensor) -> Tensor:
        """The gradient of x through the norm, plus `more`."""
        return norm_backward(grad, x, mean, deviation, self._norm.weight, self._norm.bias, more)

    def attention(
        self, normed: Tensor, shape: torch.Size, cos: Tensor, sin: Tensor, seed: int, repeats: Repeats | None
    ) -> list[Tensor]:
        """Output, with a graph to the queries, key and value that follow it, each (batch, heads or 1, length, head size)."""
        fused = self.qkv.forward(normed, seed, repeats=repeats).view(*shape[:2], self._heads + 2, -1)
        parts = fused.split((self._heads, 1, 1), dim=2)
        rotate(parts, cos, sin, out=fused, back=False)
        with torch.enable_grad():
            query, key, value = (part.transpose(1, 2).detach().requires_grad_() for part in parts)
            return [causal_attention(query, key, value), query, key, value]


class _DecoderLayer(torch.autograd.Function):
    """One layer as one step of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor | None,
        repeats: Repeats | None,
        layer: _Layer,
        seed: int,
        *adapters: Any,
    ) -> Tensor:
        """The layer's output.

        Args:
            ctx: of autograd.
            x: (batch, length, hidden) in the compute type.
            cos, sin: (length, head size), of the rotary embedding, in the compute type.
            rows: int64 (selected,), positions in the flattened batch whose output is needed; None for all. The other
                rows are computed only as far as attention needs them.
            repeats: of the tokens, in the first layer; equal rows of x are then multiplied once.
            layer: the frozen weights, and what to recompute in the backward pass.
            seed: of the layer's dropout. The four projections use seed to seed + 3.
            adapters: A and B of each projection or None, only so that autograd sees them.

        Returns:
            (batch, length, hidden), or (selected, hidden) where `rows` is given.
        """
        flat = x.flatten(0, 1)
        normed, _, _ = layer.norm(flat)
        attention = layer.attention(normed, x.shape, cos, sin, seed, repeats)
        if repeats is not None and not layer.adapts_mlp():
            before = layer.up.forward(_rows(normed, repeats.first), seed + 2)
            y = _rows(layer.down.forward(gelu(before), seed + 3), repeats.which).add_(flat)
        else:
            before = layer.up.forward(_rows(normed, rows), seed + 2)
            y = layer.down.forward(gelu(before), seed + 3, onto=flat.clone() if rows is None else _rows(flat, rows))
        y = layer.dense.forward(_rows(_merged(attention[0].detach()), rows), seed + 1, onto=y)
        keeps_mlp = layer.recompute == "none" and (ctx.needs_input_grad[0] or layer.adapts_mlp())
        ctx.save_for_backward(x, cos, sin, rows, before if keeps_mlp else None)
        ctx.layer, ctx.seed, ctx.repeats = layer, seed, repeats
        ctx.attention = None if layer.recompute == "full" else attention
        return y.view_as(x) if rows is None else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        """Gradients of x (None below the first layer: the embedding is frozen) and of the LoRA matrices.

        Args:
            ctx: of the forward pass.
            grad_y: like the output.
        """
        x, cos, sin, rows, before = ctx.saved_tensors
        layer, seed, attention = ctx.layer, ctx.seed, ctx.attention
        ctx.attention = None
        needs_x = ctx.needs_input_grad[0]
        flat = x.flatten(0, 1)
        grad = grad_y.flatten(0, 1) if rows is None else grad_y.contiguous()
        normed, mean, deviation = layer.norm(flat)
        if attention is None:
            attention = layer.attention(normed, x.shape, cos, sin, seed, ctx.repeats)

        of_mlp: tuple[Any, ...] = (None,) * 4
        grad_normed = None
        if needs_x or layer.adapts_mlp():
            selected = _rows(normed, rows)
            if before is None:
                before = layer.up.forward(selected, seed + 2)
            inner = gelu(before) if layer.down.adapter()[0] is not None else None
            grad_inner, *of_down = layer.down.backward(grad, inner, seed + 3)
            del inner
            grad_before = gelu_backward_(grad_inner, before)
            del grad_inner, before
            grad_normed, *of_up = layer.up.backward(grad_before, selected, seed + 2, needs_input=needs_x)
            grad_normed = _all_rows(grad_normed, rows, len(flat)) if needs_x else None
            del grad_before, selected
            of_mlp = (*of_up, *of_down)

        out, *leaves = attention
        merged = _rows(_merged(out.detach()), rows)
        grad_out, *of_dense = layer.dense.backward(grad, merged, seed + 1)
        grad_out = _all_rows(grad_out, rows, len(flat)).view(*x.shape[:2], out.shape[1], -1).transpose(1, 2)
        grads = [g.transpose(1, 2) for g in torch.autograd.grad(out, leaves, grad_out)]
        del attention, out, leaves, merged, grad_out
        grad_fused = normed.new_empty(*x.shape[:2], len(grads[0][0, 0]) + 2, cos.shape[-1])
        rotate(grads, cos, sin, out=grad_fused, back=True)
        grad_fused = grad_fused.flatten(0, 1).flatten(1)
        del grads
        grad_normed, *of_qkv = layer.qkv.backward(grad_fused, normed, seed, onto=grad_normed, needs_input=needs_x)
        grad_x = None
        if needs_x:
            residual = _all_rows(grad, rows, len(flat))
            grad_x = layer.norm_backward(grad_normed, flat, mean, deviation, residual).view_as(x)
        return (grad_x, None, None, None, None, None, None, *of_qkv, *of_dense, *of_mlp)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _all_rows(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """The inverse of `_rows`, with zeros in the other rows: (selected, features) → (count, features)."""
    return x if rows is None else x.new_zeros(count, x.shape[1]).index_copy_(0, rows, x)


def _merged(out: Tensor) -> Tensor:
    """(batch, heads, length, size) → (tokens, hidden)."""
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


# -- the backbone ------------------------------------------------------------------------------------------------------


def supports(backbone: Any) -> bool:
    """Whether a backbone is built like Falcon-7B's: parallel attention, one key/value head, rotary positions, no biases,
    and no dropout in the base."""
    config = backbone.config
    return config.model_type == "falcon" and bool(
        config.parallel_attn
        and config.multi_query
        and not config.new_decoder_architecture
        and not config.alibi
        and not config.bias
        and config.activation == "gelu"
        and config.hidden_dropout == 0
        and config.attention_dropout == 0
    )


class Backbone:
    """The layers of a backbone that this module `supports`.

    Args:
        backbone: with its frozen weights and, if any, its adapter.
        recompute: what the backward pass recomputes besides what it always does. mlp: the MLP's first product; full:
            the attention too, so that each layer keeps its input only.
    """

    def __init__(self, backbone: Any, recompute: Recompute):
        self._backbone = backbone
        self._inside = [module for layer in backbone.h for module in layer.modules()]
        adapted = [module for module in self._inside if hasattr(module, "lora_A")]
        self._is_plain = all(_is_plain_lora(module) for module in adapted)
        self._adapted = adapted
        heads = backbone.config.num_attention_heads
        layers = backbone.h if self._is_plain else []
        self._layers = [_Layer(layer, heads, recompute) for layer in layers]

    def can_run(self) -> bool:
        """Whether no hook sits in the layers (sharding, tracing) and no adapter is merged."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self._inside)
        return self._is_plain and not hooked and not any(module.merged for module in self._adapted)

    def hidden_states(self, input_ids: Tensor, rows: Tensor, repeats: Repeats | None = None) -> Tensor:
        """The backbone's last hidden state at some positions, for a batch padded on the right.

        Args:
            input_ids: int64 (batch, length).
            rows: int64 (selected,), positions in the flattened batch, none of them padding.
            repeats: of `input_ids`; the result is the same without.

        Returns:
            (selected, hidden size) in the compute type.
        """
        backbone = self._backbone
        x = backbone.word_embeddings(input_ids)
        if not len(rows):
            return x.new_zeros(0, x.shape[-1])
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = (t[0].contiguous() for t in backbone.rotary_emb(x, position_ids=positions))
        seeds = torch.randint(2**62, (len(self._layers),)).tolist() if backbone.training else [0] * len(self._layers)
        first, last = self._layers[0], self._layers[-1]
        for layer, seed in zip(self._layers, seeds, strict=True):
            selected = rows if layer is last else None
            equal = repeats if layer is first and first is not last else None
            x = _DecoderLayer.apply(x, cos, sin, selected, equal, layer, seed, *layer.adapters())
        normed: Tensor = backbone.ln_f(x)
        return normed


def _is_plain_lora(module: Any) -> bool:
    """Whether a layer has one adapter of two matrices, without biases or another variant of LoRA."""
    matrices = (*module.lora_A.values(), *module.lora_B.values())
    plain = len(module.active_adapters) == 1 and not module.lora_variant
    return plain and all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices)
