"""Frozen 4-bit weights kept dense while answers are made, where the memory has room for both.

Each token of an answer multiplies every weight once more. A product with dense weights takes a quarter to three quarters of the
time that bitsandbytes' fused 4-bit product takes (`benchmarks/decoding_products.py`), and a CPU, which has no fused product, makes
the weights dense for each product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kestrel.model.budget import free_memory
from kestrel.model.kernels import cards
from kestrel.model.loss import fast_layers_of
from kestrel.model.projection import FrozenWeight

_SHARE = 0.5  # of the free memory; the rest is for keys, values and activations
# Up to so many rows the fused product is taken on a GPU before Ampere, whose memory is slow and which has it for 128.
_FUSED_BEFORE_AMPERE = 32


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[bool]:
    """Keeps the weights of the 4-bit layers dense inside the block; tells whether there is room."""
    from bitsandbytes.nn import Linear4bit

    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    sizes = [layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize for layer in layers]
    fast = fast_layers_of(model)
    groups = fast.groups() if fast is not None else []
    held = bool(groups) and all(group.is_dense for group in groups)  # as training may keep them
    fits = bool(layers) and (held or sum(sizes) <= _SHARE * free_memory(layers[0].weight.device))
    try:
        # Nothing else, such as a hook, may have replaced what they compute.
        if fits and not any("forward" in vars(layer) for layer in layers):
            side_by_side = dict(pair for group in groups for pair in group.hold(layers[0].compute_dtype))
            for layer in layers:
                dense = side_by_side.get(layer)
                dense = FrozenWeight(layer).dense(layer.compute_dtype) if dense is None else dense
                layer.forward = functools.partial(_product, layer, dense)
        yield fits
    finally:
        for group in groups if not held else ():
            group.let_go()
        for layer in layers:
            if isinstance(getattr(layer, "forward", None), functools.partial):
                del layer.forward


def _product(layer: Any, dense: Tensor, x: Tensor) -> Tensor:
    """As the layer's own forward pass."""
    if cards.is_before_ampere() and x.numel() <= _FUSED_BEFORE_AMPERE * x.shape[-1]:
        own: Tensor = type(layer).forward(layer, x)
        return own
    bias = None if layer.bias is None else layer.bias.to(dense.dtype)
    return F.linear(x.to(dense.dtype), dense, bias).to(x.dtype)
