"""LoRA's updates in the compute type while answers are made.

PEFT casts the input to the float32 of the adapter's weights, multiplies and adds in float32, and casts the sum back: eight
launches a layer and token, and wide matrices in float32. Here the narrow side is rounded to the compute type, as in the layers
that trained (`projection.Group`), and the product adds the update to the frozen one before it rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kestrel.model.fast_layers import is_plain_lora


@contextmanager
def light_updates(model: nn.Module) -> Iterator[None]:
    """Inside the block, the layers of an adapter that is switched on compute so. The adapter must not change there."""
    changed: list[Any] = []
    for module in model.modules():
        if not hasattr(module, "lora_A") or "forward" in vars(
            module
        ):  # something else, such as a hook, has replaced it
            continue
        layer: Any = module
        if is_plain_lora(layer) and not layer.merged and not layer.disable_adapters:
            (name,) = layer.active_adapters
            dtype = getattr(layer.base_layer, "compute_dtype", None) or layer.base_layer.weight.dtype
            a, b = (matrices[name].weight.detach().to(dtype) for matrices in (layer.lora_A, layer.lora_B))
            layer.forward = functools.partial(_updated, layer, a * layer.scaling[name], b)
            changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _updated(layer: Any, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x)
    if y.dtype != a.dtype:
        return y + ((x.to(a.dtype) @ a.t()) @ b.t()).to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ a.t(), b.t())
    return y
