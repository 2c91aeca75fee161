"""A model of the base's shape with random weights, to estimate memory and to time passes.

Nothing is downloaded or quantized. On the meta device it takes no memory; on a GPU its random weights have the layout of
4-bit ones, so passes take as long as with the real ones.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Quantization, Settings
from kestrel.model.base import refuse_overflow
from kestrel.model.gpu_memory import let_segments_grow
from kestrel.model.kernels.attention import use_fused_kernels
from kestrel.model.quantization import BLOCK_SIZE, NESTED_BLOCK_SIZE, concrete, forbid_repacking, linear_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

_SPREAD = 0.02  # the standard deviation that models are commonly initialized with


def random_model(settings: Settings, config: PretrainedConfig, device: torch.device) -> PeftModel:
    """The base with a new adapter, as `load_base` and `add_lora` make it, with random weights; on meta, shapes only."""
    model = random_base(settings, config, device)
    with device:
        return add_lora(model, settings.lora, settings.seed)


def random_base(settings: Settings, config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """The base as `load_base` makes it, with random weights; on the meta device, shapes only."""
    from transformers import AutoModelForCausalLM

    wanted = concrete(settings.quantization)
    refuse_overflow(config, wanted.compute_dtype)
    dtype = getattr(torch, wanted.compute_dtype)
    use_fused_kernels(config.model_type)
    let_segments_grow(device)
    trusted = settings.model.trust_remote_code
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
    layers = linear_layers(model) if wanted.bits == 4 else {}
    for name, (inputs, outputs) in layers.items():
        parent, _, leaf = name.rpartition(".")
        has_bias = getattr(model.get_submodule(name), "bias", None) is not None
        layer = _linear_in_4bit(inputs, outputs, has_bias, wanted, dtype, device)
        setattr(model.get_submodule(parent), leaf, layer)
    if device.type != "meta":
        model._apply(functools.partial(_random, device=device))  # as Module.to does
        model.tie_weights()
    forbid_repacking(model)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = wanted.bits == 4  # peft chooses its layer classes by it
    return model


def _linear_in_4bit(
    inputs: int, outputs: int, has_bias: bool, wanted: Quantization, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Linear4bit, Params4bit

    weights = inputs * outputs
    blocks = -(-weights // BLOCK_SIZE)
    # get_4bit_type knows real devices only.
    code = torch.empty(16, device=device) if device.type == "meta" else get_4bit_type(wanted.type, device=device)
    state: dict[str, Any] = {"absmax": torch.full((blocks,), 3 * _SPREAD, device=device)}
    if wanted.double_quant:
        constants = torch.full((-(-blocks // NESTED_BLOCK_SIZE),), _SPREAD, device=device)
        levels = torch.linspace(-1, 1, 256, device=device)
        second = QuantState(absmax=constants, code=levels, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
        places = torch.full((blocks,), 255, dtype=torch.uint8, device=device)
        state = {"absmax": places, "offset": torch.full((), 2 * _SPREAD, device=device), "state2": second}
    packed = torch.empty(((weights + 1) // 2, 1), dtype=torch.uint8, device=device)
    if device.type != "meta":
        packed.random_()
    with torch.device("meta"):
        layer = Linear4bit(inputs, outputs, bias=has_bias, compute_dtype=dtype, quant_type=wanted.type)
    shape, kind = torch.Size((outputs, inputs)), wanted.type
    quant_state = QuantState(shape=shape, code=code, blocksize=BLOCK_SIZE, quant_type=kind, dtype=dtype, **state)
    settings = {"compress_statistics": wanted.double_quant, "quant_type": kind, "bnb_quantized": True}
    layer.weight = Params4bit(packed, quant_state=quant_state, module=layer, **settings)
    if has_bias:
        layer.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device="meta"))
    return layer


def _random(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Of the shape of a tensor on the meta device, on a real one: a random matrix, or a vector of ones."""
    if not tensor.is_meta:
        return tensor
    real = torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
    return real.normal_(0, _SPREAD) if real.dim() > 1 and real.is_floating_point() else real
