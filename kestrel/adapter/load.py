"""Base and adapter, opened, put together, and proven to compute what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kestrel.adapter.lora import load_adapter
from kestrel.adapter.proof import prove_loaded
from kestrel.config.settings import Settings
from kestrel.model.base import load_base
from kestrel.model.loss import attach_token_nll
from kestrel.prompt.prompt import Prompt


def load_model(settings: Settings, prompt: Prompt, adapter: tuple[Path, dict[str, Any]] | None) -> Any:
    """Loads the base and puts the adapter on it, ready for answers and likelihoods; prints what was loaded and proven.

    Args:
        adapter: its folder and manifest, from `open_adapter`; None for the base alone.

    Raises:
        KestrelError: base or adapter cannot be loaded.
        ProofError: the base is not what the settings ask for, or the adapter computes something else than in training.
    """
    model: Any
    model, audit = load_base(settings)
    print(f"base: {audit.line()}")
    if adapter is not None:
        model = load_adapter(model, adapter[0])
        print(f"adapter: {settings.model.adapter or adapter[0]}")
    attach_token_nll(model)
    prompt.ends_also_at(model.generation_config.eos_token_id)
    if adapter is not None:
        print(prove_loaded(model, adapter[1], prompt.identity(), settings.quantization.compute_dtype))
    return model
