"""The base: checked before its weights load, and loaded in 4 or 16 bit."""

from __future__ import annotations

import logging
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kestrel.config.settings import Model, Settings, memory_bytes
from kestrel.errors import KestrelError
from kestrel.hub import plain_loading_errors
from kestrel.model.defaults import check_vocabulary, refuse_other_kinds, saved_quantization, settings_for
from kestrel.model.files import require_weights
from kestrel.model.gpu_memory import let_segments_grow
from kestrel.model.kernels.attention import use_fused_kernels
from kestrel.model.quantization import (
    Audit,
    audit,
    compute_in,
    concrete,
    expected_footprint_bytes,
    forbid_repacking,
    quantizable_layers,
)
from kestrel.runtime.manifest import sha256_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from kestrel.prompt.prompt import Prompt

_MOST_LAYERS = 1000
ADAPTER_CONFIG = "adapter_config.json"
_HASHED_UP_TO = 2**30  # bytes of weights; hashing the 14 GB of a Falcon-7B at each start would take half a minute


# Their hidden states exceed 65,504, the largest number of float16, and the likelihoods are no numbers: Gemma 2 and 3 were
# trained in bfloat16 with an embedding that is scaled up and norms behind each block (their model cards name bfloat16).
_EXCEEDS_FLOAT16 = ("gemma2", "gemma3")


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def device_name() -> str:
    """The GPU, or the processor and the threads that torch uses of it."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def load_config(settings: Model) -> PretrainedConfig:
    """The architecture of the base model."""
    from transformers import AutoConfig

    if Path(settings.name).is_dir() and not (Path(settings.name) / "config.json").is_file():
        raise KestrelError(f"model.name {settings.name} holds no config.json; copy the whole folder of the model")
    with plain_loading_errors("configuration", settings.name):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    layers = getattr(config, "num_hidden_layers", None) or 0
    if not isinstance(layers, int) or layers > _MOST_LAYERS:
        raise KestrelError(f"model.name {settings.name}: config.json asks for {layers!r} layers; no model has so many")
    return config


def exceeds_float16(config: PretrainedConfig) -> bool:
    """Whether an architecture's hidden states are known to exceed float16."""
    return bool(config.model_type.startswith(_EXCEEDS_FLOAT16))


def refuse_overflow(config: PretrainedConfig, compute_dtype: str) -> None:
    """Refuses architectures whose numbers are known to exceed float16.

    Raises:
        KestrelError: naming the types that work.
    """
    if compute_dtype == "float16" and exceeds_float16(config):
        raise KestrelError(
            f"the hidden states of a {config.model_type} model exceed float16's range; set quantization.compute_dtype to "
            "float32, or to bfloat16 on a GPU that computes in it (Ampere and later)"
        )


def open_base(settings: Settings, prompt: Prompt) -> tuple[Settings, PretrainedConfig]:
    """The settings with what they leave to the base, and its architecture. Checks what can be checked without weights.

    Raises:
        KestrelError: an adapter's files beside the base's, a tokenizer with more tokens than the base knows, a model of
            another kind, or another quantization than the settings ask for.
    """
    check_vocabulary(settings.model, prompt)
    _refuse_adapter_files(settings.model)
    config = load_config(settings.model)
    refuse_other_kinds(settings.model, config.to_dict())
    resolved = settings_for(settings, config.to_dict())
    if resolved.quantization != settings.quantization:
        held = resolved.quantization
        nested = "with" if held.double_quant else "without"
        print(
            f"note: {settings.model.name} is saved in 4 bit ({held.type}, {nested} double quantization); so it is used"
        )
    return resolved, config


def _refuse_adapter_files(settings: Model) -> None:
    """transformers (5.23) would load an adapter that lies beside a base, and the base that the adapter names."""
    from transformers.utils.peft_utils import find_adapter_config_file

    with plain_loading_errors("files", settings.name):
        if find_adapter_config_file(settings.name, revision=settings.revision) is None:
            return
    raise KestrelError(
        f"model.name {settings.name} holds an adapter ({ADAPTER_CONFIG}). If it is an adapter, give it as model.adapter and "
        f"its base as model.name; if it is a merged model, delete {ADAPTER_CONFIG} from it"
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
        to_be_sharded: where the whole base is too large for this process's device, load it into the machine's memory.

    Raises:
        KestrelError: it cannot be loaded.
        ProofError: it is not what the settings ask for.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted, chosen = concrete(settings.quantization), settings.model
    dtype = getattr(torch, wanted.compute_dtype)
    config = load_config(chosen)
    refuse_overflow(config, wanted.compute_dtype)
    skeleton = skeleton_of(config, chosen.trust_remote_code)
    require_weights(chosen.name, skeleton.num_parameters())
    use_fused_kernels(config.model_type)
    let_segments_grow(device())
    place = _room_for_whole(expected_footprint_bytes(skeleton, wanted), settings) if to_be_sharded else device()
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=wanted.type,
            bnb_4bit_use_double_quant=wanted.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        if wanted.bits == 4
        else None
    )
    # transformers (5.23) would have a repository without safetensors converted by a service on the Hub, unasked.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with plain_loading_errors("weights", chosen.name), quantizable_layers(), _without_the_librarys_report():
        model, loaded = AutoModelForCausalLM.from_pretrained(
            chosen.name,
            revision=chosen.revision,
            trust_remote_code=chosen.trust_remote_code,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": str(place)},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported
            output_loading_info=True,
        )
    _require_whole(chosen.name, config.model_type, loaded)
    if saved_quantization(config.to_dict()):
        compute_in(model, dtype)
    report = audit(model, skeleton, wanted)
    forbid_repacking(model)
    model.requires_grad_(False).eval()
    return model, report


@contextmanager
def _without_the_librarys_report() -> Iterator[None]:
    """While weights load: `_require_whole` says what is wrong with them."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # of a base saved in 4 bit
            yield
    finally:
        logger.setLevel(level)


def _require_whole(name: str, model_type: str, loaded: Mapping[str, Any]) -> None:
    """Refuses a base of which a part would begin at random, as transformers has it; says what was left out."""
    unknown = sorted(loaded["unexpected_keys"])
    if missing := sorted(loaded["missing_keys"]):
        instead = f"; they hold {unknown[0]}, which no {model_type} model has" if unknown else ""
        raise KestrelError(
            f"the files of model.name {name} lack {len(missing)} of the model's weights, such as {missing[0]}{instead}. Copy "
            "the folder again from where it was made, or save the model again with save_pretrained"
        )
    for weight, found, expected in sorted(loaded["mismatched_keys"]):
        raise KestrelError(
            f"the files of model.name {name} hold {weight} of shape {list(found)}, and its config.json asks for "
            f"{list(expected)}; take both from the same model"
        )
    if unknown:
        print(
            f"note: {len(unknown)} weights in the files of {name} have no place in a {model_type} model and are left out, "
            f"such as {unknown[0]}"
        )


def note_on_untrained_end(model: PreTrainedModel, prompt: Prompt) -> str | None:
    """A sentence where the head's row of the end token is one that the base's training never reached, else None.

    Such rows are zero, or alike for all such tokens. LoRA on other layers does not change them.
    """
    weight = model.get_output_embeddings().weight
    row = weight[prompt.end_id]
    if bool(row.any()) and int((weight[:, : min(64, len(row))] == row[:64]).all(dim=1).sum()) == 1:
        return None
    return (
        f"the base was never trained on {prompt.tokenizer.convert_ids_to_tokens(prompt.end_id)}, which ends each reply here, as "
        "base models whose tokenizer has an instruct model's template; replies may not end. Use the instruct model, or "
        "prompt.format: plain"
    )


def _room_for_whole(size: int, settings: Settings) -> torch.device:
    """This process's device if a base of that size fits beside what loading takes, else the CPU."""
    here = device()
    if here.type == "cpu":
        return here
    free, named = torch.cuda.mem_get_info(here)[0], memory_bytes(settings.training.device_memory)
    return here if 1.2 * size < min(free, named or free) else torch.device("cpu")


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
