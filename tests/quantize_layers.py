"""Linear layers of a small model in 4 bit, without loading it."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from kestrel.model.quantization import forbid_repacking


def quantize(base: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Holds the linear layers in 4 bit, all but the head."""
    for name, linear in list(base.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type=kind
            )
            layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type=kind, module=layer)
            layer.bias = linear.bias
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, layer.to("cpu"))
    base.is_loaded_in_4bit = True  # peft chooses its layer classes by it
    forbid_repacking(base)
