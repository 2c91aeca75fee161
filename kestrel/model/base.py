"""The base in 4 or 16 bit, and the adapter on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from kestrel.config.settings import Lora, Model, Settings
from kestrel.errors import KestrelError
from kestrel.hub import plain_loading_errors
from kestrel.model.kernels.attention import use_fused_kernels
from kestrel.model.quantization import Audit, audit, forbid_repacking, linear_layers, quantizable_layers
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import sha256_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

_HASHED_UP_TO = 2**30  # bytes of weights; hashing the 14 GB of a Falcon-7B at each start would take half a minute


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_config(settings: Model) -> PretrainedConfig:
    """The architecture of the base model."""
    from transformers import AutoConfig

    with plain_loading_errors("configuration", settings.name):
        return AutoConfig.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )


def skeleton_of(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture on the meta device: shapes and names, no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_base(settings: Settings, to_be_sharded: bool = False) -> tuple[PreTrainedModel, Audit]:
    """The frozen base on this process's device, quantized as asked and audited.

    The same preparation serves training and inference. Nothing is lifted to float32: peft's own k-bit preparation
    would do so with the embedding and the head, half a gigabyte on Falcon-7B, for no better loss.

    Args:
        settings: of the run.
        to_be_sharded: store packed 4-bit weights in compute_dtype, because only tensors of floating point are sharded.

    Raises:
        KestrelError: it cannot be loaded.
        ProofError: it is not what the settings ask for.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted, chosen = settings.quantization, settings.model
    dtype = getattr(torch, wanted.compute_dtype)
    config = load_config(chosen)
    use_fused_kernels(config.model_type)
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=wanted.type,
            bnb_4bit_use_double_quant=wanted.double_quant,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if to_be_sharded else torch.uint8,
        )
        if wanted.bits == 4
        else None
    )
    # transformers (5.23) would have a repository without safetensors converted by a service on the Hub, unasked.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with plain_loading_errors("weights", chosen.name), quantizable_layers():
        model = AutoModelForCausalLM.from_pretrained(
            chosen.name,
            revision=chosen.revision,
            trust_remote_code=chosen.trust_remote_code,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": str(device())},
            use_safetensors=True,
        )
    report = audit(model, skeleton_of(config, chosen.trust_remote_code), wanted)
    forbid_repacking(model)
    model.requires_grad_(False)
    model.eval()
    return model, report


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


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Puts a saved adapter on the base, for inference.

    Raises:
        KestrelError: no adapter in the folder, or one for another architecture.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    if not (folder / "adapter_config.json").is_file():
        raise KestrelError(f"there is no adapter in {folder}; train one with: python train.py --config …")
    if not (folder / "adapter_model.safetensors").is_file():  # peft would unpickle adapter_model.bin instead
        raise KestrelError(f"there is no adapter_model.safetensors in {folder}; other forms of weights are not read")
    config = adapter_config(folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=False)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            # peft (0.21) only warns of weights that have no place here, and leaves those without a weight as they were.
            odd = file.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  sizes and names that do not fit raise many types
        raise KestrelError(f"the adapter in {folder} does not load onto this base: {error}") from None
    if odd:
        raise KestrelError(f"the adapter in {folder} is for other layers than this base has, such as {min(odd)}")
    return adapted


def adapter_config(folder: Path) -> LoraConfig:
    """The adapter's configuration: plain LoRA, as ours is.

    peft (0.21) has many further fields. One names a module to import, others let tensors be unpickled or replace layers
    of the base; here they must stand at their defaults.

    Raises:
        KestrelError: damaged, another kind of adapter, or a further field that is set.
    """
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    given = read_json(path, "train the adapter anew")
    plain = LoraConfig(task_type="CAUSAL_LM")
    defaults = json.loads(json.dumps(plain.to_dict(), default=sorted))
    about = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"}
    ours = {"r", "lora_alpha", "lora_dropout", "target_modules"}
    if not isinstance(given, dict):
        raise KestrelError(f"{path} is damaged (no configuration); train the adapter anew")
    for name in sorted(given.keys() - about - ours):
        # Another version of peft may have fields that this one has not; unset, they mean nothing.
        if given[name] != defaults.get(name) and (name in defaults or given[name]):
            raise KestrelError(f"{path}: {name} is {given[name]!r}; only plain LoRA adapters are read")
    try:
        checked = Lora.model_validate(
            {
                "r": given.get("r"),
                "alpha": given.get("lora_alpha"),
                "dropout": given.get("lora_dropout"),
                "target_modules": given.get("target_modules"),
            }
        )
    except ValidationError as error:
        where = error.errors()[0]
        raise KestrelError(f"{path} is damaged ({where['loc'][0]}: {where['msg']}); train the adapter anew") from None
    return lora_config(checked)


def check_context(model: torch.nn.Module, longest: int, max_new_tokens: int = 0) -> None:
    """Refuses sequences that are longer than the positions which the model was trained on.

    Args:
        longest: tokens of the longest dialogue, or of the longest prompt where something is to follow it.
        max_new_tokens: what is to follow.

    Raises:
        KestrelError: they do not fit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest + max_new_tokens > limit:
        what = f"a prompt of {longest} tokens and generation.max_new_tokens {max_new_tokens} exceed"
        if not max_new_tokens:
            what = f"a dialogue of {longest} tokens exceeds"
        advice = "lower prompt.max_length and run preprocess.py again"
        raise KestrelError(
            f"{what} the model's context of {limit}; {advice}{', or lower the latter' if max_new_tokens else ''}"
        )


def base_identity(settings: Model, config: PretrainedConfig) -> dict[str, Any]:
    """What makes two bases the same: the commit on the Hub, or the content of a local folder wherever it lies."""
    folder = Path(settings.name)
    if not folder.is_dir():
        return {"name": settings.name, "commit": getattr(config, "_commit_hash", None)}
    weights = sorted(folder.glob("*.safetensors"))
    small = sum(path.stat().st_size for path in weights) <= _HASHED_UP_TO
    files = {path.name: sha256_of(path) if small else f"{path.stat().st_size} bytes" for path in weights}
    return {"files": {"config.json": sha256_of(folder / "config.json"), **files}}
