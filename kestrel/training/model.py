"""The model that is trained: the frozen base with a fresh adapter, sharded if need be, and proven to compute the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Settings
from kestrel.model.base import check_context, device, load_base
from kestrel.model.loss import attach_token_nll, collate, prove_loss
from kestrel.model.quantization import Audit
from kestrel.training import sharding

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from kestrel.model.decoder_layer import Recompute


def load_trainable(
    settings: Settings, recompute: Recompute, sharded: bool, longest: int, validation: Dataset, pad_id: int
) -> tuple[PeftModel, Audit]:
    """Loads the base, adds the adapter, and proves the loss on one dialogue; prints what was loaded and proven.

    Args:
        sharded: split the base over the processes.
        longest: tokens of the longest dialogue.

    Raises:
        KestrelError: the base cannot be loaded, its context is too short, or it lacks the layers to adapt.
        ProofError: the base is not what the settings ask for, or its loss is wrong.
    """
    base, audit = load_base(settings, to_be_sharded=sharded)
    check_context(base, longest)
    print(f"base: {audit.line()}")
    model = add_lora(base, settings.lora, settings.seed)
    print(f"adapter: {model.get_nb_trainable_parameters()[0]:,} trainable parameters")
    if sharded:
        print(sharding.shard(model))
    attach_token_nll(model, recompute)
    batch = collate([validation[0]], pad_id=pad_id)
    prove_loss(
        model, {name: tensor.to(device()) for name, tensor in batch.items()}, settings.quantization.compute_dtype
    )
    return model, audit
