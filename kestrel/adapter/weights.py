"""The weights of an adapter from anybody, checked before anything is built for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kestrel.adapter.source import CONFIG, WEIGHTS, repair_advice
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import unique_keys

_LONGEST_HEADER = 2**24  # bytes, enough for 100,000 tensors
if TYPE_CHECKING:
    from peft import LoraConfig

_TYPES = ("F64", "F32", "F16", "BF16")  # that LoRA can be trained or used in; the file format has others
_RANK_AT = {"A": 0, "B": 1}  # dimension of lora_A and lora_B, also of embeddings


def check_weights(folder: Path, config: LoraConfig) -> None:
    """Refuses weights that the configuration does not describe, after reading no more than the file.

    peft allocates what the configuration asks for before it compares shapes: gigabytes for a rank of 60,000.

    Raises:
        KestrelError: not safetensors, a name given twice, a tensor of another rank, or values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    path, ranks = folder / WEIGHTS, {config.r, *config.rank_pattern.values()}
    try:
        for name, entry in _header(path).items():
            part = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.|$)", name)
            shape = entry["shape"]
            if entry["dtype"] not in _TYPES:
                raise KestrelError(f"{path}: {name} is of type {entry['dtype']}; an adapter's are {', '.join(_TYPES)}")
            if part and (len(shape) != 2 or shape[_RANK_AT[part[1]]] not in ranks):
                raise KestrelError(f"{path}: {name} has shape {shape}, which does not fit rank {config.r} of {CONFIG}")
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  the file is no dict
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise KestrelError(f"{path}: {name} holds values that are not finite; the adapter is useless")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise KestrelError(f"{path} is damaged ({error}); {repair_advice(folder)}") from None


def _header(path: Path) -> dict[str, Any]:
    """Each tensor's type, shape and place in the file, by name: https://github.com/safetensors/safetensors#format"""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        header: Any = json.loads(file.read(length), object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise TypeError("a header that is no object")
    header.pop("__metadata__", None)
    return header
