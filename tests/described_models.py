"""Small models of each architecture that `kestrel/model/architecture.py` describes, with random weights and an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from quantize_layers import quantize
from torch import nn

from kestrel.model.kernels.attention import use_fused_kernels

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "attn_implementation": "sdpa",
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama with biases, tied head": lambda: transformers.LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama 3's rotary": lambda: transformers.LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": lambda: transformers.LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32
        },
    ),
    "mistral, a window that is met": lambda: transformers.MistralConfig(**SMALL, sliding_window=9),
    "mistral, a window that is not met": lambda: transformers.MistralConfig(**SMALL, sliding_window=64),
    "mistral, with what it does not read": lambda: transformers.MistralConfig(
        **SMALL, sliding_window=9, use_sliding_window=False, layer_types=["full_attention"] * 3
    ),
    "llama, with what it does not read": lambda: transformers.LlamaConfig(
        **SMALL, sliding_window=9, hidden_activation="gelu"
    ),
    "mistral, heads of another size": lambda: transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=32),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "phi3, a part of each head rotated": lambda: transformers.Phi3Config(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=16),
    "linear rotary": lambda: transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=16, query_pre_attn_scalar=24, sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, multi_query=True,
        parallel_attn=True, bias=False, alibi=False, new_decoder_architecture=False,
    ),
}  # fmt: skip


def make_described(
    name: str, dtype: torch.dtype, targets: Any = "all-linear", kind: str = "16 bit", **of_lora: Any
) -> Any:
    """A random model with an adapter that changes what it computes."""
    use_fused_kernels(name)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    for parameter in base.parameters():
        if parameter.dim() == 1:  # norms and biases begin at 1 and 0, where mistakes do not show
            nn.init.normal_(parameter, mean=0.5, std=0.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    base = base.to(dtype).requires_grad_(False)
    if kind != "16 bit":
        quantize(base, kind, dtype)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **of_lora})
    model = get_peft_model(base, lora)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()
