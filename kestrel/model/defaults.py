"""Settings that depend on the base: the layers to adapt by default, and the 4-bit form of a base that is saved in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.config.settings import Model, Settings
from kestrel.errors import KestrelError

if TYPE_CHECKING:
    from kestrel.prompt.prompt import Prompt


def check_vocabulary(settings: Model, prompt: Prompt) -> None:
    """Refuses a tokenizer with more tokens than its base has rows for. Asks only files that are on this machine.

    A special token that no prompt holds, such as a [PAD] that somebody added, does no harm.

    Raises:
        KestrelError: naming both sizes.
    """
    from huggingface_hub import try_to_load_from_cache

    path: Any = Path(settings.name) / "config.json"
    if not Path(settings.name).is_dir():  # on the Hub, from where the tokenizer was loaded just now
        path = try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        known = int({**config, **config.get("text_config", {})}["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # what loads the base says what is wrong
    vocabulary = prompt.tokenizer.get_vocab()
    unused = prompt.control_ids - {prompt.end_id, *prompt.identity()["canary_ids"]}
    beyond = [(index, token) for token, index in vocabulary.items() if index >= known and index not in unused]
    if beyond:
        raise KestrelError(
            f"the tokenizer of {settings.name} has {max(vocabulary.values()) + 1:,} tokens, such as {min(beyond)[1]!r}, and the "
            f"model's embedding has {known:,} rows; use the tokenizer that belongs to the model, or resize the embedding "
            "and save both"
        )


def refuse_other_kinds(settings: Model, config: Mapping[str, Any]) -> None:
    """Refuses what is no causal language model of text alone.

    Args:
        config: the base's config.json.

    Raises:
        KestrelError: naming what it is.
    """
    kind, made_as = config.get("model_type"), config.get("architectures") or []
    senses = [
        part.removesuffix("_config") for part in config if part in ("vision_config", "audio_config") and config[part]
    ]
    if config.get("is_encoder_decoder") or (made_as and all(name.endswith("ForMaskedLM") for name in made_as)):
        raise KestrelError(
            f"model.name {settings.name} is a {kind} model, which does not write a text from left to right; name a causal "
            "language model, such as Llama, Qwen or Falcon"
        )
    if config.get("is_causal") is False or config.get("use_bidirectional_attention") is True:
        raise KestrelError(
            f"model.name {settings.name} is a {kind} model in which each token sees the later ones, as for embeddings of whole "
            "texts (is_causal or use_bidirectional_attention in its config.json), and could copy the reply that it is to "
            "write; name the causal language model that it was made from"
        )
    if senses:
        raise KestrelError(
            f"model.name {settings.name} is a {kind} model with {' and '.join(senses)}, and Kestrel trains models of text "
            "alone; docs/faq.md shows how to save its language model as one"
        )


def settings_for(settings: Settings, config: Mapping[str, Any]) -> Settings:
    """The settings with what they leave to the base.

    Args:
        config: the base's config.json.

    Raises:
        KestrelError: the base is saved in another quantization than the settings ask for, or in one that is not read.
    """
    lora, quantization = settings.lora, settings.quantization
    if lora.target_modules == "auto":
        lora = lora.model_copy(update={"target_modules": default_layers(config.get("model_type"))})
    if saved := saved_quantization(config):
        found = {
            "bits": 4,
            "type": saved.get("bnb_4bit_quant_type", "fp4"),
            "double_quant": bool(saved.get("bnb_4bit_use_double_quant", False)),
        }
        if not saved.get("load_in_4bit", saved.get("_load_in_4bit")):
            method = saved.get("quant_method", "an unknown method")
            raise KestrelError(
                f"{settings.model.name} is already quantized ({method}); Kestrel reads bases in 16 or 32 bit and those "
                "that bitsandbytes saved in 4 bit, so name the model that it was made from"
            )
        asked = {name: getattr(quantization, name) for name in quantization.model_fields_set & found.keys()}
        if other := [name for name in asked if asked[name] != found[name]]:
            raise KestrelError(
                f"{settings.model.name} is saved in 4 bit with {other[0]} {found[other[0]]}, and the settings ask for "
                f"quantization.{other[0]} {asked[other[0]]}; remove that setting, or name the model that it was made from"
            )
        quantization = quantization.model_copy(update=found)
    return settings.model_copy(update={"lora": lora, "quantization": quantization})


def default_layers(model_type: str | None) -> list[str] | str:
    """lora.target_modules for auto: as the original project did for Falcon; elsewhere attention and MLP have many names."""
    return ["query_key_value"] if model_type == "falcon" else "all-linear"


def saved_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a base's files are quantized; empty if they are not."""
    return dict(config.get("quantization_config") or {})
