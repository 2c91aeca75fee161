"""Falcon-7B's decoder layer, written for training a LoRA adapter over a frozen base.

What is frozen needs no gradient, so little must be kept for the backward pass: of each layer its input, the attention's
inputs and output, and the MLP before its activation. Norms, activations, dropout and the dense form of the 4-bit weights
are made again when they are needed. Against transformers' layers under autograd that is a third less memory, no copy in
float32 of what goes into LoRA, and half the passes over memory between the matrix products.

The layer computes what transformers' computes (5.17 to 5.23), for rows padded on the right:

    n = norm(x);   y = x + dense(attention(rotary(qkv(n)))) + down(gelu(up(n)));   each W n + (alpha / r) B A dropout(n)

`tests/test_falcon.py` holds it against transformers' layer: outputs and LoRA gradients within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Recompute = Literal["none", "mlp", "full"]
_PROJECTIONS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def fits(backbone: Any) -> bool:
    """Whether a backbone is one whose layers this room computes, with nothing hooked into them.

    It is for Falcon-7B and models built alike: parallel attention, one key/value head, rotary positions, no biases, no
    dropout in the base; plain LoRA or none on any of the four linear layers.
    """
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "model_type", None) != "falcon":
        return False
    alike = (
        config.parallel_attn
        and config.multi_query
        and not config.new_decoder_architecture
        and not config.alibi
        and not config.bias
        and config.activation == "gelu"
        and config.hidden_dropout == 0
        and config.attention_dropout == 0
        and getattr(config, "ffn_hidden_size", None) is not None
    )
    return bool(alike) and not any(_is_foreign(module) for layer in backbone.h for module in layer.modules())


def _is_foreign(module: Any) -> bool:
    """Hooked (sharded or traced by somebody), or a variant of LoRA that is more than two matrices."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    if not hasattr(module, "lora_A"):
        return False
    names = getattr(module, "active_adapters", [])
    plain = len(names) == 1 and not getattr(module, "lora_variant", {}) and not module.merged
    return not plain or any(part.bias is not None for part in (*module.lora_A.values(), *module.lora_B.values()))


# -- elementwise pieces, which torch.compile turns into one kernel each ------------------------------------------------


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, length, heads + 2, size) → rotated queries and key in one tensor (…, heads + 1, size), and the value."""
    straight = qkv[:, :, :-1]
    low, high = straight.chunk(2, dim=-1)
    return straight * cos + torch.cat((-high, low), dim=-1) * sin, qkv[:, :, -1:].clone()


def _rotate_back(queries: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of rotated queries, key and value → the gradient of `_rotate`'s input."""
    rotated = torch.cat((queries, key), dim=2)
    turned = rotated * sin
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((high, -low), dim=-1), value), dim=2)


def _drop(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    return x * kept * scale


def _add_dropped(total: Tensor, part: Tensor, kept: Tensor, scale: float) -> Tensor:
    return total + part * kept * scale


@dataclass(frozen=True)
class _Pieces:
    rotate: Callable[..., Any] = _rotate
    rotate_back: Callable[..., Any] = _rotate_back
    drop: Callable[..., Any] = _drop
    add_dropped: Callable[..., Any] = _add_dropped


_pieces = _Pieces()


def compile_pieces() -> None:
    """Compiles the elementwise pieces for the rest of the process: some ten seconds at the first step, on a GPU."""
    global _pieces
    _pieces = _Pieces(*(torch.compile(piece, dynamic=True) for piece in (_rotate, _rotate_back, _drop, _add_dropped)))


# -- one linear layer --------------------------------------------------------------------------------------------------


class _Projection:
    """A frozen linear layer and, where there is one, its LoRA update. Activations are (tokens, features)."""

    def __init__(self, module: Any):
        self._base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        self._scaling, self._dropout = 1.0, 0.0
        if hasattr(module, "lora_A") and not module.disable_adapters:
            name = module.active_adapters[0]
            self.a, self.b = module.lora_A[name].weight, module.lora_B[name].weight
            self._scaling = float(module.scaling[name])
            dropout = module.lora_dropout[name]
            self._dropout = float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """Dense (out, in)."""
        weight = self._base.weight
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, weight.quant_state)
        return weight.to(dtype)

    def _kept(self, x: Tensor, seed: int) -> Tensor | None:
        """Which inputs dropout keeps: the same for the same seed, so that the mask need not be stored."""
        if not self._dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self._dropout, generator=generator)

    def _dropped(self, x: Tensor, kept: Tensor | None) -> Tensor:
        return x if kept is None else _pieces.drop(x, kept, 1 / (1 - self._dropout))

    def forward(self, x: Tensor, seed: int, onto: Tensor | None = None) -> Tensor:
        """The output, added to `onto` where that is given."""
        weight = self._weight(x.dtype).t()
        y = x @ weight if onto is None else torch.addmm(onto, x, weight)
        if self.a is not None and self.b is not None:
            low = self._dropped(x, self._kept(x, seed)) @ self.a.to(x.dtype).t()
            y.addmm_(low, self.b.to(x.dtype).t(), alpha=self._scaling)
        return y

    def backward(
        self, grad: Tensor, x: Tensor | None, seed: int, onto: Tensor | None = None, needs_input: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the input (added to `onto` where that is given), of A and of B; `x` is needed for LoRA only."""
        grad_x = onto
        if needs_input:
            weight = self._weight(grad.dtype)
            grad_x = grad @ weight if onto is None else torch.addmm(onto, grad, weight)
        if self.a is None or self.b is None:
            return grad_x, None, None
        assert x is not None
        a, b = self.a.to(grad.dtype), self.b.to(grad.dtype)
        kept = self._kept(x, seed)
        dropped = self._dropped(x, kept)
        grad_low = grad @ b * self._scaling
        grad_b = (grad.t() @ (dropped @ a.t())).to(self.b.dtype) * self._scaling
        grad_a = (grad_low.t() @ dropped).to(self.a.dtype)
        if needs_input:
            assert grad_x is not None
            if kept is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x = _pieces.add_dropped(grad_x, grad_low @ a, kept, 1 / (1 - self._dropout))
        return grad_x, grad_a, grad_b


# -- one layer ---------------------------------------------------------------------------------------------------------


class _Layer:
    """What one decoder layer is made of."""

    def __init__(self, layer: nn.Module, heads: int, recompute: Recompute):
        self.qkv, self.dense, self.up, self.down = (_Projection(layer.get_submodule(name)) for name in _PROJECTIONS)
        norm: Any = layer.input_layernorm
        self._norm = (list(norm.normalized_shape), norm.weight, norm.bias, norm.eps)
        self._heads = heads
        self.recompute = recompute

    def adapters(self) -> list[nn.Parameter | None]:
        return [matrix for part in (self.qkv, self.dense, self.up, self.down) for matrix in (part.a, part.b)]

    def norm(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed x, and the mean and reciprocal deviation of each row."""
        shape, weight, bias, eps = self._norm
        return torch.native_layer_norm(x, shape, weight, bias, eps)

    def norm_backward(self, grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        shape, weight, bias, _ = self._norm
        wanted = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, deviation, weight, bias, wanted)[0]

    def attention(self, normed: Tensor, shape: torch.Size, cos: Tensor, sin: Tensor, seed: int) -> list[Tensor]:
        """Output (batch, heads, length, size), and the queries, key and value that it has a graph to."""
        fused = self.qkv.forward(normed, seed).view(*shape[:2], self._heads + 2, -1)
        rotated, value = _pieces.rotate(fused, cos, sin)
        parts = (rotated[:, :, : self._heads], rotated[:, :, self._heads :], value)
        with torch.enable_grad():
            query, key, value = (part.transpose(1, 2).detach().requires_grad_() for part in parts)
            if query.is_cuda:
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            else:
                every = (-1, self._heads, -1, -1)
                out = F.scaled_dot_product_attention(query, key.expand(every), value.expand(every), is_causal=True)
        return [out, query, key, value]


class _DecoderLayer(torch.autograd.Function):
    """One layer as one step of autograd. Inputs after `seed` are the LoRA matrices, so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layer: _Layer, seed: int, *adapters: Any) -> Tensor:
        flat = x.flatten(0, 1)
        normed, _, _ = layer.norm(flat)
        attention = layer.attention(normed, x.shape, cos, sin, seed)
        before = layer.up.forward(normed, seed + 2)
        y = layer.down.forward(F.gelu(before), seed + 3, onto=flat)
        y = layer.dense.forward(_merged(attention[0].detach()), seed + 1, onto=y)
        ctx.save_for_backward(x, cos, sin, before if layer.recompute == "none" else None)
        ctx.layer, ctx.seed = layer, seed
        ctx.attention = None if layer.recompute == "full" else attention
        return y.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, cos, sin, before = ctx.saved_tensors
        layer, seed, attention = ctx.layer, ctx.seed, ctx.attention
        ctx.attention = None
        needs_x = ctx.needs_input_grad[0]  # not below the first layer: the embedding is frozen
        flat, grad = x.flatten(0, 1), grad_y.flatten(0, 1)
        normed, mean, deviation = layer.norm(flat)
        if attention is None:
            attention = layer.attention(normed, x.shape, cos, sin, seed)

        of_mlp: tuple[Any, ...] = (None,) * 4
        grad_normed = None
        if needs_x or layer.up.a is not None or layer.down.a is not None:
            if before is None:
                before = layer.up.forward(normed, seed + 2)
            inner = F.gelu(before) if layer.down.a is not None else None
            grad_inner, *of_down = layer.down.backward(grad, inner, seed + 3)
            del inner
            grad_before = torch.ops.aten.gelu_backward(grad_inner, before)
            del grad_inner, before
            grad_normed, *of_up = layer.up.backward(grad_before, normed, seed + 2, needs_input=needs_x)
            del grad_before
            of_mlp = (*of_up, *of_down)

        out, *leaves = attention
        merged = _merged(out.detach())
        grad_out, *of_dense = layer.dense.backward(grad, merged, seed + 1)
        grad_out = grad_out.view(*x.shape[:2], out.shape[1], -1).transpose(1, 2)
        grads = [g.transpose(1, 2) for g in torch.autograd.grad(out, leaves, grad_out)]
        del attention, out, leaves, merged, grad_out
        grad_fused = _pieces.rotate_back(*grads, cos, sin).flatten(0, 1).flatten(1)
        del grads
        grad_normed, *of_qkv = layer.qkv.backward(grad_fused, normed, seed, onto=grad_normed, needs_input=needs_x)
        grad_x = None
        if needs_x:
            grad_x = layer.norm_backward(grad_normed, flat, mean, deviation).add_(grad).view_as(x)
        return (grad_x, None, None, None, None, *of_qkv, *of_dense, *of_mlp)


def _merged(out: Tensor) -> Tensor:
    """(batch, heads, length, size) → (tokens, hidden)."""
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def hidden_states(backbone: Any, input_ids: Tensor, recompute: Recompute) -> Tensor:
    """What the backbone returns as its last hidden state, for rows padded on the right.

    Args:
        backbone: that `fits`, with its frozen weights.
        input_ids: int64 (rows, length).
        recompute: what the backward pass makes again beside what it always does. mlp: the MLP's first product; full:
            the attention too, so that of each layer only the input is kept.

    Returns:
        (rows, length, hidden size) in the compute type. What stands at padding means nothing.
    """
    x = backbone.word_embeddings(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    cos, sin = (t[:, :, None] for t in backbone.rotary_emb(x, position_ids=positions))
    seeds = torch.randint(2**62, (len(backbone.h),)).tolist() if backbone.training else [0] * len(backbone.h)
    for layer, seed in zip(backbone.h, seeds, strict=True):
        parts = _Layer(layer, backbone.config.num_attention_heads, recompute)
        x = _DecoderLayer.apply(x, cos, sin, parts, seed, *parts.adapters())
    return backbone.ln_f(x)
