"""The peers: TRL's SFTTrainer and the original project's recipe, over a base that really is in 4 bit.

transformers alone would quantize none of Falcon's layers (kestrel/model/quantization.py), and a comparison with a peer that
computes in 16 bit would say nothing. Everything else is theirs: attention, loss, batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from benchmarks.agreement import Row
from benchmarks.profiles import LEARNING_RATE, LORA, MAX_LENGTH, System
from kestrel.config.settings import Model, Quantization
from kestrel.model.base import device, load_config, skeleton_of
from kestrel.model.quantization import audit, forbid_repacking, quantizable_layers


def load_base(folder: Path, dtype: str) -> torch.nn.Module:
    """The NF4 base as transformers makes it, with the layers that it would skip, and nothing else of ours."""
    kind = getattr(torch, dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    with quantizable_layers():
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), quantization_config=quantization, dtype=kind, device_map={"": str(device())}
        )
    audit(model, skeleton_of(load_config(Model(name=str(folder)))), Quantization(compute_dtype=dtype))
    forbid_repacking(model)
    return model


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(**LORA, task_type="CAUSAL_LM")


def turns_of(rows: list[Row]) -> list[Row]:
    """One example a reply: all tokens up to its end, of which the reply's are supervised."""
    examples = []
    for row in rows:
        for start, end in row["reply_spans"]:
            labels = [-100] * start + row["input_ids"][start:end]
            examples.append({"input_ids": row["input_ids"][:end], "labels": labels})
    return examples


def padded(example: Row, pad_id: int) -> Row:
    """The original recipe's form: filled up to the longest length there may be, everything supervised."""
    ids = example["input_ids"][:MAX_LENGTH]
    missing = MAX_LENGTH - len(ids)
    filled = ids + [pad_id] * missing
    return {"input_ids": filled, "attention_mask": [1] * len(ids) + [0] * missing, "labels": filled}


def spread(examples: list[Row], count: int) -> list[Row]:
    """`count` of the examples, whose lengths are distributed as all lengths are; all where there are no more."""
    if count >= len(examples):
        return examples
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    return [ordered[int(place)] for place in (np.arange(count) + 0.5) * len(ordered) / count]


def trainer_of(
    system: System, model: torch.nn.Module, folder: Path, output: Path, rows: list[Row]
) -> tuple[Trainer, int]:
    """A peer's trainer, ready to run, and the number of its examples in an epoch.

    Args:
        system: which peer.
        model: from `load_base`.
        folder: of the model, for its tokenizer.
        output: a folder for what the trainer writes.
        rows: of the dialogues.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.pad_token = tokenizer.eos_token
    on_gpu = device().type == "cuda"
    assert system.batch_size is not None
    steps = system.warmup + system.steps
    given: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": system.batch_size,
        "learning_rate": LEARNING_RATE,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **system.options,
    }
    columns = ("input_ids", "labels")
    examples = rows if system.kind in ("trl-dialogues", "trl-packed") else turns_of(rows)
    chosen = [{name: example[name] for name in columns} for example in spread(examples, steps * system.batch_size)]
    if system.kind == "original":
        from peft import get_peft_model, prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=given["gradient_checkpointing"])
        model = get_peft_model(model, lora_config())
        data = Dataset.from_list([padded(example, tokenizer.pad_token_id) for example in chosen])
        return Trainer(model=model, args=TrainingArguments(**given), train_dataset=data), len(examples)
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**given, max_length=MAX_LENGTH, packing=system.kind == "trl-packed"),
        train_dataset=Dataset.from_list(chosen),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    return trainer, len(examples)


def loss_by(system: System, trainer: Trainer, rows: list[Row]) -> Callable[[int, tuple[int, int], Row], float]:
    """How a peer says what one reply costs it, for `agreement.check`: its own batch, its own loss.

    The original recipe's loss is over everything, so that the reply's part is taken from its logits.
    """

    @torch.no_grad()
    def original(number: int, span: tuple[int, int], row: Row) -> float:
        start, end = span
        example = padded({"input_ids": row["input_ids"][:end]}, trainer.model.config.eos_token_id)
        batch = trainer._prepare_inputs(trainer.data_collator([example]))
        logits = trainer.model(**batch).logits[0, start - 1 : end - 1].float()
        return float(F.cross_entropy(logits, batch["labels"][0, start:end]))

    @torch.no_grad()
    def trl(number: int, span: tuple[int, int], row: Row) -> float:
        if system.kind == "trl-turns":
            examples = [{name: ids[: span[1]] for name, ids in row.items()}]
        elif system.kind == "trl-dialogues":
            examples = [row]
        else:  # all of them in one sequence, the others' replies not supervised
            blank = [{"input_ids": other["input_ids"], "labels": [-100] * len(other["input_ids"])} for other in rows]
            examples = [*blank[:number], row, *blank[number + 1 :]]
            examples = [{**example, "seq_lengths": [len(example["input_ids"])]} for example in examples]
        batch = trainer._prepare_inputs(trainer.data_collator(examples))
        return float(trainer.compute_loss(trainer.model, batch))

    return original if system.kind == "original" else trl
