"""Which type stands behind `quantization.compute_dtype: auto`: the one that was trained in, or else the machine's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from kestrel.adapter.source import find_adapter
from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.model.base import exceeds_float16, load_config
from kestrel.model.kernels import cards
from kestrel.runtime import distributed
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST


def adapter_folder(settings: Settings) -> Path:
    """Where the adapter of the settings is, or would be: that of model.adapter, or the run's own."""
    name = settings.model.adapter
    return find_adapter(name) if name is not None else Path(settings.run_dir) / "adapter"


def with_compute_dtype(settings: Settings, trained: Iterable[Path] | None = None, planned: bool = False) -> Settings:
    """The settings with a type in place of auto, which is printed; others as they are.

    What was trained keeps its type on every machine: an adapter computes what it did, and a run resumes.

    Args:
        trained: folders of checkpoints or adapters, whose type is taken from the first that records one; None: the
            settings' adapter.
        planned: for a card that need not be there.

    Raises:
        KestrelError: the adapter is nowhere.
    """
    quantization = settings.quantization
    if quantization.compute_dtype != "auto":
        return settings

    def chosen() -> tuple[str, str]:
        for folder in [adapter_folder(settings)] if trained is None else trained:
            if recorded := _recorded_in(folder):
                return recorded, f"recorded in {folder}"
        if planned and cards.capability() is None:
            return "bfloat16", "as on a GPU since Ampere"
        dtype = cards.best_dtype()
        if dtype == "float16" and exceeds_float16(load_config(settings.model)):
            return "float32", f"{cards.name()} does not compute in bfloat16, and this model exceeds float16"
        return dtype, f"on {'this CPU' if cards.capability() is None else cards.name()}"

    dtype, reason = distributed.broadcast_from_first(chosen)
    print(f"compute type: {dtype}, {reason}")
    return settings.model_copy(update={"quantization": quantization.model_copy(update={"compute_dtype": dtype})})


def _recorded_in(folder: Path) -> str | None:
    """The compute type in a manifest; None where there is none, or it is damaged, which its reader will report."""
    if not (folder / MANIFEST).is_file():
        return None
    with contextlib.suppress(KestrelError, LookupError, TypeError):
        recorded = read_json(folder / MANIFEST, "")["settings"]["quantization"]["compute_dtype"]
        return recorded if recorded in ("bfloat16", "float16", "float32") else None
    return None
