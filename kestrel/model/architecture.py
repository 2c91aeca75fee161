"""What the decoder layers of the architectures are made of that `fast_layers.py` computes itself.

Another architecture is one more description here; `tests/model/test_fast_layers.py` holds each against transformers' own
layers. Whatever is not described goes through transformers' layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kestrel.model.kernels.elementwise import Activation


@dataclass(frozen=True)
class Architecture:
    """The decoder layers of one backbone.

    Attributes:
        embedding, layers, final_norm: names of the backbone's parts.
        input_norm, mlp_norm: names of a layer's norms; mlp_norm is None where attention and MLP are parallel, so that
            both read the input norm.
        qkv: names of the linear layers that make queries, keys and values; one name where one layer makes all three.
        output: name of the linear layer behind the attention.
        gate_up: names of the MLP's first linear layers: gate and up, or one name of both; without a gate, of up alone.
        down: name of the MLP's last linear layer.
        heads, kv_heads: query heads, and key/value heads, each of which serves heads / kv_heads query heads.
        head_size: numbers of a head.
        activation: of the gate, or of up where there is no gate.
        gated: whether the MLP has a gate.
        offset: added to the weights of an RMS norm (a norm without a bias): 1 for Gemma.
        query_norm, key_norm: names of the norms of each query's and key's head, or None.
        windows: for each layer how many positions back attention reaches, its own included; None: all.
        embedding_scale: the embeddings are multiplied by it.
        output_norm, down_norm: names of the norms of what `output` and `down` make, before it is added; or None.
        query_scale: normed queries are multiplied by it before they are scaled as usual.
        rotaries: for each layer the kind of its rotation, where the backbone has several; None: it has one.
    """

    embedding: str
    layers: str
    final_norm: str
    input_norm: str
    mlp_norm: str | None
    qkv: tuple[str, ...]
    output: str
    gate_up: tuple[str, ...]
    down: str
    heads: int
    kv_heads: int
    head_size: int
    activation: Activation
    gated: bool
    offset: float
    query_norm: str | None
    key_norm: str | None
    windows: tuple[int | None, ...]
    embedding_scale: float = 1.0
    output_norm: str | None = None
    down_norm: str | None = None
    query_scale: float = 1.0
    rotaries: tuple[str, ...] | None = None


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Architectures with Llama's layer. Falcon 3, SmolLM2 and Yi are Llamas by their model type, too.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text")


def describe(backbone: Any) -> Architecture | None:
    """The description of a transformers backbone; None where its layers are not known here (transformers 5.17 to 5.23)."""
    config = backbone.config
    # By its full name: a repository's own code (model.trust_remote_code) may have a module of that name, with other layers.
    name = config.model_type.removesuffix("_text")
    if type(backbone).__module__ != f"transformers.models.{name}.modeling_{name}":
        return None
    if config.model_type == "falcon":
        return _falcon(config)
    return _llama(config) if config.model_type in _LIKE_LLAMA else None


def _falcon(config: Any) -> Architecture | None:
    """Falcon-7B: attention and MLP in parallel, one key/value head, layer norm, no gate and no bias."""
    known = bool(
        config.parallel_attn
        and config.multi_query
        and not config.new_decoder_architecture
        and not config.alibi
        and not config.bias
        and config.activation == "gelu"
        and config.hidden_dropout == 0
        and config.attention_dropout == 0
    )
    if not known:
        return None
    return Architecture(
        embedding="word_embeddings",
        layers="h",
        final_norm="ln_f",
        input_norm="input_layernorm",
        mlp_norm=None,
        qkv=("self_attention.query_key_value",),
        output="self_attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        heads=config.num_attention_heads,
        kv_heads=1,
        head_size=config.hidden_size // config.num_attention_heads,
        activation="gelu",
        gated=False,
        offset=0.0,
        query_norm=None,
        key_norm=None,
        windows=(None,) * config.num_hidden_layers,
    )


def _llama(config: Any) -> Architecture | None:
    """Llama and its family: sequential, RMS norm, grouped heads, a gated MLP."""
    gemma3 = config.model_type == "gemma3_text"
    activation = _ACTIVATIONS.get(config.hidden_activation if gemma3 else config.hidden_act)
    dropped = [getattr(config, name, 0) for name in ("attention_dropout", "resid_pdrop", "embd_pdrop")]
    capped = gemma3 and (config.attn_logit_softcapping or config.use_bidirectional_attention)
    if activation is None or any(dropped) or capped:
        return None
    fused = config.model_type == "phi3"
    heads = config.num_attention_heads
    normed = gemma3 or config.model_type == "qwen3"
    gemma = gemma3 or config.model_type == "gemma"
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Architecture(
        embedding="embed_tokens",
        layers="layers",
        final_norm="norm",
        input_norm="input_layernorm",
        mlp_norm="pre_feedforward_layernorm" if gemma3 else "post_attention_layernorm",
        qkv=("self_attn.qkv_proj",) if fused else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        gate_up=("mlp.gate_up_proj",) if fused else ("mlp.gate_proj", "mlp.up_proj"),
        down="mlp.down_proj",
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=size,
        activation=activation,
        gated=True,
        offset=1.0 if gemma else 0.0,
        query_norm="self_attn.q_norm" if normed else None,
        key_norm="self_attn.k_norm" if normed else None,
        windows=_windows(config),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        output_norm="post_attention_layernorm" if gemma3 else None,
        down_norm="post_feedforward_layernorm" if gemma3 else None,
        query_scale=(size / config.query_pre_attn_scalar) ** 0.5 if gemma3 else 1.0,
        rotaries=tuple(config.layer_types) if gemma3 else None,
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Of each layer. Which architectures read `sliding_window` and `layer_types` is decided as transformers' layers decide it:
    a configuration may hold either where they are not read, as of a Llama that was made from a Mistral.
    """
    layers = config.num_hidden_layers
    if config.model_type in ("mistral", "phi3"):  # the same for all layers
        return (config.sliding_window,) * layers
    if config.model_type in ("qwen2", "qwen3", "gemma3_text"):
        return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
    return (None,) * layers
