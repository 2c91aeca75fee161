"""The model of a conversation, loaded and proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kestrel.adapter.compute_dtype import with_compute_dtype
from kestrel.adapter.load import load_model
from kestrel.adapter.open import open_adapter
from kestrel.chat.streaming import ChatModel
from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.model.base import base_identity, load_config
from kestrel.prompt.prompt import Prompt


def load_chat_model(settings: Settings, prompt: Prompt, again: str) -> ChatModel:
    """The base and, unless generation.systems is base alone, the adapter, proven to be the trained one."""
    settings, name = with_compute_dtype(settings), _short(settings.model.name)
    if "adapter" not in settings.generation.systems:
        return ChatModel(load_model(settings, prompt, None), prompt, ["base"], f"{name} alone")
    base = base_identity(settings.model, load_config(settings.model))
    try:
        adapter = open_adapter(settings, prompt, base, f"python train.py {again}")
    except KestrelError as error:
        raise KestrelError(f"{error}\n  or talk with the base alone: --generation.systems base") from None
    model = load_model(settings, prompt, adapter)
    title = f"{name} with the adapter of {_short(settings.model.adapter or settings.run_dir)}"

    def find_adapter(name: str) -> tuple[Path, dict[str, Any]]:
        model = settings.model.model_copy(update={"adapter": name})
        return open_adapter(settings.model_copy(update={"model": model}), prompt, base, "")

    return ChatModel(model, prompt, ["adapter", "base"], title, find_adapter)


def _short(path: str) -> str:
    """A path without its folders, where it is absolute; other names as they are."""
    return Path(path).name if Path(path).is_absolute() else path
