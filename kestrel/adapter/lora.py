"""LoRA on the base: a fresh adapter, or one from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from kestrel.adapter.source import CONFIG, WEIGHTS, lora_of, read_config, repair_advice, require_files
from kestrel.config.settings import Lora
from kestrel.errors import KestrelError
from kestrel.model.quantization import linear_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def lora_config(lora: Lora) -> LoraConfig:
    """The settings in peft's words."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Puts a fresh adapter on the base; its weights are float32, the base's stay as they are.

    Raises:
        KestrelError: target_modules names layers the model does not have.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    names = sorted({name.rpartition(".")[2] for name in linear_layers(model)})  # before peft wraps some of them
    try:
        return get_peft_model(model, lora_config(lora))
    except ValueError as error:
        raise KestrelError(
            f"lora.target_modules {lora.target_modules} does not fit this model ({error}); "
            f"its linear layers are {', '.join(names)}"
        ) from None


def load_adapter(model: PreTrainedModel, folder: Path, dropout: float | None = None) -> PeftModel:
    """Puts a saved adapter on the base, for inference, or with a dropout to train it on.

    Raises:
        KestrelError: no adapter in the folder, or one for another architecture.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    require_files(str(folder), {path.name for path in folder.iterdir()})  # peft would unpickle adapter_model.bin
    config = adapter_config(folder)
    try:
        if dropout is not None:
            config.lora_dropout = dropout
        adapted = PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=dropout is not None, low_cpu_mem_usage=True
        )
        with safe_open(folder / WEIGHTS, "pt") as file:
            # peft (0.21) only warns of weights that have no place here, and leaves those without a weight as they were.
            unmatched = file.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  sizes and names that do not fit raise many types
        raise KestrelError(f"the adapter in {folder} does not load onto this base: {error}") from None
    if unmatched:
        raise KestrelError(f"the adapter in {folder} is for other layers than this base has, such as {min(unmatched)}")
    return adapted


def adapter_config(folder: Path) -> LoraConfig:
    """The adapter's configuration: plain LoRA, as ours is.

    peft (0.21) has many further fields. One names a module to import, others let tensors be unpickled or replace layers
    of the base; here they must have their defaults.

    Raises:
        KestrelError: damaged, another kind of adapter, or a further field that is set.
    """
    from peft import LoraConfig

    given, path = read_config(folder), folder / CONFIG
    defaults = json.loads(json.dumps(LoraConfig(task_type="CAUSAL_LM").to_dict(), default=sorted))
    about = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"}
    ours = {"r", "lora_alpha", "lora_dropout", "target_modules"}
    for name in sorted(given.keys() - about - ours):
        # Another version of peft may have fields that this one does not have; unset, they mean nothing.
        if given[name] != defaults.get(name) and (name in defaults or given[name]):
            raise KestrelError(f"{path}: {name} is {given[name]!r}; only plain LoRA adapters are read")
    try:
        return lora_config(Lora.model_validate(lora_of(given)))
    except ValidationError as error:
        where = error.errors()[0]
        raise KestrelError(f"{path} is damaged ({where['loc'][0]}: {where['msg']}); {repair_advice(folder)}") from None
