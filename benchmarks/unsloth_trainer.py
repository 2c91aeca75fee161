"""unsloth's model and trainer. train.py imports unsloth before anything else, since it replaces parts of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from benchmarks.agreement import Row
from benchmarks.profiles import LORA, MAX_LENGTH
from kestrel.errors import ProofError

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear ones of a layer


def trainer_of(given: dict[str, Any], folder: Path, examples: list[Row]) -> Trainer:
    """unsloth's trainer, ready to run.

    Args:
        given: what every peer's trainer is given; gradient_checkpointing is False, or "unsloth" for its own.
        folder: of a model whose weights are in NF4.
        examples: input_ids and labels of dialogues.

    Raises:
        ProofError: a linear layer is not in 4 bit.
    """
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    checkpointing = given["gradient_checkpointing"]
    base, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=MAX_LENGTH,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    _require_4bit(base)
    model = FastLanguageModel.get_peft_model(
        base,
        r=LORA["r"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=LORA["lora_dropout"],
        target_modules=LAYERS,
        bias="none",
        random_state=0,
        max_seq_length=MAX_LENGTH,
        use_gradient_checkpointing=checkpointing,
    )
    if checkpointing:  # then the model's setting counts
        given = {name: value for name, value in given.items() if name != "gradient_checkpointing"}
    trainer: Trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**given, max_length=MAX_LENGTH, packing=False, dataset_num_proc=1),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    to_training(trainer.model, bool(checkpointing))
    return trainer


def to_training(model: Any, checkpointing: bool) -> None:
    """Sets unsloth's model to training, which its trainer leaves when it is made."""
    from unsloth import FastLanguageModel

    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)


def _require_4bit(model: Any) -> None:
    import bitsandbytes as bnb

    found = sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    expected = len(LAYERS) * model.config.num_hidden_layers
    if found != expected:
        raise ProofError(f"unsloth holds {found} of {expected} linear layers in 4 bit")
