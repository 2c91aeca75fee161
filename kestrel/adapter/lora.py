"""LoRA on the base: a fresh adapter, or one from a folder."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kestrel.adapter.source import CONFIG, WEIGHTS, lora_of, read_config, repair_advice, require_files
from kestrel.config.settings import Lora
from kestrel.errors import KestrelError
from kestrel.model.defaults import default_layers
from kestrel.model.quantization import linear_layers
from kestrel.prompt.limits import limited

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Puts a fresh adapter on the base; its weights are float32, the base's stay as they are.

    Raises:
        KestrelError: target_modules names layers the model does not have, or an output head that is tied.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = default_layers(model.config.model_type) if lora.target_modules == "auto" else lora.target_modules
    # Before peft wraps some of them.
    names = ", ".join(sorted({name.rpartition(".")[2] for name in linear_layers(model)}))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        # GPT-2's layers are transposed (Conv1D). In 4 bit they no longer are, but the adapter is for both.
        fan_in_fan_out=hasattr(sys.modules[type(model).__module__], "Conv1D"),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="fan_in_fan_out is set to True|Model has `tie_word_embeddings=True`"
            )
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise KestrelError(
            f"lora.target_modules {targets} does not fit this model ({error}); its linear layers are "
            f"{names}; all-linear takes all of them"
        ) from None
    if hasattr(model.get_output_embeddings(), "lora_A") and model.config.tie_word_embeddings:
        raise KestrelError(
            "lora.target_modules names this model's output head, whose weights are those of its embedding, so an update "
            f"would hold for one of the two only; name others of its linear layers: {names}"
        )
    return adapted


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, dropout: float | None = None, label: str = "default"
) -> PeftModel:
    """Puts a saved adapter on the base, for inference, or with a dropout to train it on.

    Args:
        model: the base, or a base with adapters; the new one then stands beside them, not yet active.
        label: PEFT's name for the new adapter.

    Raises:
        KestrelError: no adapter in the folder, or one for another architecture.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    # peft would unpickle adapter_model.bin
    require_files(str(folder), {path.name for path in folder.iterdir() if path.is_file()})
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config, copies = adapter_config(folder), _copies_of_weights(base, folder / WEIGHTS)
    _try_patterns(config, base, folder)
    kept = {module: module.weight for module in copies.values()}
    try:
        if dropout is not None:
            config.lora_dropout = dropout
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            if isinstance(model, PeftModel):
                adapted = model
                model.load_adapter(str(folder), label, low_cpu_mem_usage=True)
            else:
                adapted = PeftModel.from_pretrained(
                    model, str(folder), label, dropout is not None, config=config, low_cpu_mem_usage=True
                )
        with safe_open(folder / WEIGHTS, "pt") as file:
            # peft (0.21) only warns of weights that have no place here, and leaves those without a weight as they were.
            placed = get_peft_model_state_dict(adapted, adapter_name=label, save_embedding_layers=False)
            unmatched = file.keys() ^ placed.keys()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  sizes and names that do not fit raise many types
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise KestrelError(f"the adapter in {folder} does not load onto this base: {reason}") from None
    finally:
        for module, weight in kept.items():
            module.weight = weight  # peft replaces it by the copy, of another type
    if unmatched := unmatched - copies.keys():
        raise KestrelError(f"the adapter in {folder} is for other layers than this base has, such as {min(unmatched)}")
    return adapted


def _try_patterns(config: LoraConfig, model: PreTrainedModel, folder: Path) -> None:
    """Matches the configuration's patterns once as peft will, within limits: a pattern can be written to take for ever."""
    names = [name for name, _ in model.named_modules()]
    whole = [given for given in (config.target_modules, config.exclude_modules) if isinstance(given, str)]
    within = config.layers_pattern or []
    patterns = [
        *whole,
        *(rf"(.*\.)?({key})$" for key in (*config.rank_pattern, *config.alpha_pattern)),
        *(rf".*\.{each}\.(\d+)\." for each in ([within] if isinstance(within, str) else within)),
    ]
    if patterns:
        limited(
            lambda: str(sum(bool(re.match(p, n)) for p in patterns for n in names)), f"a pattern in {folder / CONFIG}"
        )


def _copies_of_weights(model: PreTrainedModel, path: Path) -> dict[str, torch.nn.Module]:
    """The base's own embedding and head, which peft saves with an adapter that adapts them: name -> their module.

    Raises:
        KestrelError: they are other ones, as where tokens were added or the embedding was trained.
    """
    from safetensors import safe_open

    copies: dict[str, torch.nn.Module] = {}
    modules = dict(model.named_modules())
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  the file is no dict
            if "lora_" in key:
                continue
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            module = modules.get(name.removesuffix(".weight"))
            module = getattr(module, "base_layer", module)  # of one that another adapter adapts
            own, held = getattr(module, "weight", None), file.get_tensor(key)
            if module is None or own is None or own.shape != held.shape or not torch.equal(held.to(own), own):
                raise KestrelError(
                    f"{path} holds {name} of shape {list(held.shape)}, and the base has another, as where tokens were added "
                    "or the embedding was trained too. Merge it with peft and use the result as model.name"
                )
            copies[key] = module
    return copies


# Fields of peft's configuration that decide what an adapter computes, and that are read as peft reads them.
_READ = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora",
)  # fmt: skip
_ABOUT = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"}


class _Further(BaseModel):
    """The forms of the fields of `_READ` that are no settings of ours."""

    model_config = ConfigDict(strict=True)
    target_modules: Annotated[list[str], Field(max_length=10_000)] | str  # peft compares each name with all others
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=2**16)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False


# How weights began does not matter once they are trained, unless the base was changed too (PiSSA, OLoRA, LoftQ).
_INITIAL = (True, False, "gaussian", "orthogonal")


def adapter_config(folder: Path) -> LoraConfig:
    """The adapter's configuration: LoRA, rsLoRA or DoRA.

    peft (0.21) has many further fields. One names a module to import, others let tensors be unpickled, train copies of
    layers or replace layers of the base; here they must have their defaults.

    Raises:
        KestrelError: damaged, another kind of adapter, or a further field that is set.
    """
    from peft import LoraConfig

    given, path = read_config(folder), folder / CONFIG
    defaults = json.loads(json.dumps(LoraConfig(task_type="CAUSAL_LM").to_dict(), default=sorted))
    for name in sorted(given.keys() - _ABOUT - {*_READ}):
        # Another version of peft may have fields that this one does not have; unset, they mean nothing.
        if given[name] == defaults.get(name) or (name not in defaults and not given[name]):
            continue
        if name == "task_type" and given[name] is None:  # who made it left that open
            continue
        if name != "init_lora_weights" or given[name] not in _INITIAL:
            raise KestrelError(
                f"{path}: {name} is {given[name]!r}; Kestrel reads LoRA, rsLoRA and DoRA adapters without that. "
                "Merge it with peft and use the result as model.name"
            )
    damaged = f"{path} is damaged ({{}}); {repair_advice(folder)}"
    lora, targets = lora_of(given), given.get("target_modules")
    try:
        if isinstance(targets, str) and targets != "all-linear":
            re.compile(targets)
            lora["target_modules"] = "all-linear"
        Lora.model_validate(lora)
        _Further.model_validate(given)
        return LoraConfig(**{name: given[name] for name in _READ if name in given}, task_type="CAUSAL_LM")
    except ValidationError as error:
        where = error.errors()[0]
        raise KestrelError(damaged.format(f"{where['loc'][0]}: {where['msg']}")) from None
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise KestrelError(damaged.format(error)) from None
