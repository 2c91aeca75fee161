"""The peers: TRL's SFTTrainer, unsloth, and the original project's recipe, over a base that really is in 4 bit.

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

from benchmarks import agreement
from benchmarks.agreement import Row
from benchmarks.profiles import LEARNING_RATE, MAX_LENGTH, Profile, System
from kestrel.batching import steps_of_run
from kestrel.config.settings import Model, Quantization
from kestrel.model.base import device, load_config, skeleton_of
from kestrel.model.quantization import audit, compute_in, forbid_repacking, quantizable_layers


def load_base(folder: Path, dtype: str) -> torch.nn.Module:
    """The NF4 base as transformers makes or loads it, with the layers that it would skip, and nothing else of ours."""
    kind = getattr(torch, dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    with quantizable_layers():
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), quantization_config=quantization, dtype=kind, device_map={"": str(device())}
        )
    compute_in(model, kind)  # weights that were saved in 4 bit come with the type they were saved with
    audit(model, skeleton_of(load_config(Model(name=str(folder)))), Quantization(compute_dtype=dtype))
    forbid_repacking(model)
    return model


def lora_config(profile: Profile) -> Any:
    from peft import LoraConfig

    return LoraConfig(**profile.lora, task_type="CAUSAL_LM")


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


def in_steps_of_kestrel(examples: list[Row], size: int, steps: int) -> list[Row]:
    """The examples of so many optimizer steps of `size`, in the order in which Kestrel trains on them."""
    lengths = np.asarray([len(example["input_ids"]) for example in examples])
    return [examples[row] for step in steps_of_run(lengths, size, 1.0, steps, seed=0) for row in step]


def arguments_of(system: System, output: Path) -> dict[str, Any]:
    """What a peer's trainer is told, in the names of transformers' TrainingArguments.

    Args:
        output: a folder for what the trainer writes.
    """
    on_gpu = device().type == "cuda"
    return {
        "output_dir": str(output),
        "max_steps": system.warmup + system.steps,
        "per_device_train_batch_size": system.batch_size,
        "gradient_accumulation_steps": system.passes,
        "learning_rate": LEARNING_RATE,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "bf16": on_gpu,
        **({} if on_gpu else {"use_cpu": True}),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **system.options,
    }


def trainer_of(
    system: System, profile: Profile, folder: Path, output: Path, rows: list[Row], dtype: str
) -> tuple[Trainer, int]:
    """A peer's trainer, ready to run, and the number of its examples in an epoch.

    Args:
        system: which peer.
        profile: says which layers get LoRA.
        folder: of the model.
        output: a folder for what the trainer writes.
        rows: of the dialogues.
        dtype: of the computation.
    """
    assert system.batch_size is not None
    given = arguments_of(system, output)
    size, steps = system.batch_size * system.passes, system.warmup + system.steps
    examples = rows if of_dialogues(system) else turns_of(rows)
    in_order = given.get("train_sampling_strategy") == "sequential"
    chosen = in_steps_of_kestrel(examples, size, steps) if in_order else spread(examples, steps * size)
    chosen = [{name: example[name] for name in ("input_ids", "labels")} for example in chosen]
    if system.kind == "unsloth":
        from benchmarks import unsloth_trainer

        return unsloth_trainer.trainer_of(given, folder, chosen), len(examples)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = load_base(folder, dtype)
    if system.kind == "original":
        from peft import get_peft_model, prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=given["gradient_checkpointing"])
        model = get_peft_model(model, lora_config(profile))
        data = Dataset.from_list([padded(example, tokenizer.pad_token_id) for example in chosen])
        return Trainer(model=model, args=TrainingArguments(**given), train_dataset=data), len(examples)
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**given, max_length=MAX_LENGTH, packing=system.kind == "trl-packed"),
        train_dataset=Dataset.from_list(chosen),
        processing_class=tokenizer,
        peft_config=lora_config(profile),
    )
    if trainer.args.use_liger_kernel:  # transformers would apply it only in train(), after the check
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
        trainer.args.use_liger_kernel = False
    return trainer, len(examples)


def of_dialogues(system: System) -> bool:
    """Whether an example is a whole dialogue; else it is a turn."""
    return system.kind in ("trl-dialogues", "trl-packed", "unsloth")


def check(system: System, trainer: Trainer, rows: list[Row], reference: Path, dtype: str) -> dict[str, float]:
    """Compares a peer's losses and gradient with the reference's. The original recipe's gradient is of everything, not
    of the replies alone, and is not compared.

    Args:
        rows: of the dialogues that the reference was made of.
        reference: its file.
        dtype: of the computation.

    Raises:
        ProofError: more than rounding lies between them.
    """
    model = trainer.model
    assert model is not None
    if system.kind == "unsloth":
        from benchmarks import unsloth_trainer

        unsloth_trainer.to_training(model, bool(system.options.get("gradient_checkpointing")))
    model.train()
    loss_of = loss_by(system, trainer, rows)
    found = {"loss_difference": agreement.check(system.name, model, rows, loss_of, reference, dtype)}
    if system.kind != "original":
        backward = backward_by(system, trainer, rows)
        found["gradient_difference"] = agreement.check_gradient(system.name, model, backward, reference, dtype)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def loss_of_batch(trainer: Trainer, examples: list[Row]) -> torch.Tensor:
    """A peer's own loss, nats a supervised token, of one batch as its own collator makes it."""
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(trainer.model, batch)
    return loss


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
    def others(number: int, span: tuple[int, int], row: Row) -> float:
        if system.kind == "trl-turns":
            examples = [{name: ids[: span[1]] for name, ids in row.items()}]
        elif system.kind == "trl-packed":  # all of them in one sequence, the others' replies not supervised
            blank = [{"input_ids": other["input_ids"], "labels": [-100] * len(other["input_ids"])} for other in rows]
            examples = [*blank[:number], row, *blank[number + 1 :]]
            examples = [{**example, "seq_lengths": [len(example["input_ids"])]} for example in examples]
        else:
            examples = [row]
        return float(loss_of_batch(trainer, examples))

    return original if system.kind == "original" else others


def backward_by(system: System, trainer: Trainer, rows: list[Row]) -> Callable[[], None]:
    """How a peer computes the gradient of the mean loss, for `agreement.check_gradient`, in passes of its batch size."""
    columns = ["input_ids", "labels"] + (["seq_lengths"] if system.kind == "trl-packed" else [])
    examples = rows if of_dialogues(system) else turns_of(rows)
    examples = [{**example, "seq_lengths": [len(example["input_ids"])]} for example in examples]
    examples = [{name: example[name] for name in columns} for example in examples]
    assert system.batch_size is not None
    passes = [examples[first : first + system.batch_size] for first in range(0, len(examples), system.batch_size)]

    def supervised(batch: list[Row]) -> int:
        return sum(label != -100 for example in batch for label in example["labels"])

    def backward() -> None:
        for batch in passes:
            loss = loss_of_batch(trainer, batch) * (supervised(batch) / supervised(examples))
            trainer.accelerator.backward(loss)

    return backward
