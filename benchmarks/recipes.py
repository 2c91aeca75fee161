"""Trains a LoRA adapter as people train one without Kestrel, for benchmarks/results.py.

    python benchmarks/recipes.py trl-turns --run RUN --model FOLDER --options '{"seed": 1, "epochs": 3}'

The base is in NF4 and LoRA has Kestrel's shape in every recipe; the recipe decides examples, loss, batches and schedule.
Reads RUN/dataset, writes RUN/recipe, a folder that `model.adapter` takes, and prints seconds and peak memory as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TURNS_A_STEP = 128  # replies of 16 dialogues, which are a step of the other systems, rounded to a power of 2
Row = dict[str, Any]


def as_messages(row: Row, tokenizer: Any) -> list[Row]:
    """One example per reply in TRL's form for conversations: the messages before it, and the reply.

    The system message is the one that Kestrel wrote, read from the row's tokens; ChatML alone is understood.
    """
    system = tokenizer.decode(row["input_ids"]).partition("system\n")[2].partition("<|im_end|>")[0]
    messages = [{"role": "system", "content": system}]
    examples = []
    for turn in row["turns"]:
        message = {"role": "user" if turn["speaker"] == "partner" else "assistant", "content": turn["text"]}
        if turn["speaker"] == "self":
            examples.append({"prompt": list(messages), "completion": [message]})
        messages.append(message)
    return examples


def original(base: Any, tokenizer: Any, rows: list[Row], given: Row) -> Any:
    """The original project's: one example per reply, padded to 512 with the end token, loss on all positions."""
    from datasets import Dataset
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    from benchmarks.peers import padded

    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=True), lora_config())
    data = Dataset.from_list([padded(row, tokenizer.eos_token_id) for row in rows])
    return Trainer(model=model, args=TrainingArguments(**given, **_turns(64)), train_dataset=data)


def trl_turns(base: Any, tokenizer: Any, rows: list[Row], given: Row) -> Any:
    """TRL's for conversations as prompt and completion: one example per reply, loss on the reply."""
    return _sft(
        base, tokenizer, [example for row in rows for example in as_messages(row, tokenizer)], given | _turns(64)
    )


def trl_dialogues(base: Any, tokenizer: Any, rows: list[Row], given: Row) -> Any:
    """TRL's with whole dialogues, loss on all replies: what `assistant_only_loss` does where a template supports it."""
    columns = ("input_ids", "labels")
    return _sft(base, tokenizer, [{name: row[name] for name in columns} for row in rows], given | _steps_of(16))


def trl_defaults(base: Any, tokenizer: Any, rows: list[Row], given: Row) -> Any:
    """`trl_turns` with TRL's own learning rate, schedule and batch size."""
    kept = (
        "output_dir",
        "num_train_epochs",
        "max_steps",
        "seed",
        "use_cpu",
        "bf16",
        "report_to",
        "save_strategy",
        "disable_tqdm",
    )
    examples = [example for row in rows for example in as_messages(row, tokenizer)]
    return _sft(base, tokenizer, examples, {name: given[name] for name in kept if name in given})


RECIPES: dict[str, Callable[[Any, Any, list[Row], Row], Any]] = {
    "original": original,
    "trl-turns": trl_turns,
    "trl-dialogues": trl_dialogues,
    "trl-defaults": trl_defaults,
}


def _steps_of(examples: int, passes: int = 1) -> Row:
    return {"per_device_train_batch_size": examples // passes, "gradient_accumulation_steps": passes}


def _turns(a_pass: int) -> Row:
    return _steps_of(TURNS_A_STEP, TURNS_A_STEP // a_pass)


def _sft(base: Any, tokenizer: Any, examples: list[Row], given: Row) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=base,
        args=SFTConfig(**given),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


def train(recipe: str, run: Path, model: Path, options: Row) -> Row:
    """Trains and saves.

    Args:
        recipe: of `RECIPES`.
        run: a run folder with the dataset.
        model: folder of the base.
        options: seed, epochs, learning_rate and max_steps (None: all).

    Returns:
        Seconds from the base's loading to the saved adapter, peak bytes, and optimizer steps.
    """
    from datasets import load_from_disk
    from transformers import AutoTokenizer, set_seed

    from benchmarks import machine, peers
    from kestrel.model.base import device

    began = time.monotonic()
    machine.reset_peak_memory()
    set_seed(options["seed"])
    dtype = machine.compute_dtype()
    on_gpu = device().type == "cuda"
    given = {
        "output_dir": str(run / "recipe-state"),
        "num_train_epochs": options["epochs"],
        "max_steps": options["max_steps"] or -1,
        "learning_rate": options["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "optim": "adamw_torch",
        "seed": options["seed"],
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = list(load_from_disk(str(run / "dataset" / "train")))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    trainer = RECIPES[recipe](peers.load_base(model, dtype), tokenizer, rows, given)
    trainer.train()
    trainer.model.save_pretrained(str(run / "recipe"))
    steps = trainer.state.global_step
    return {"seconds": round(time.monotonic() - began, 1), "peak_bytes": machine.peak_memory(), "steps": steps}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--run", type=Path, required=True, help="run folder with the dataset")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--options", type=json.loads, default={}, help="seed, epochs, learning_rate, max_steps as JSON")
    options = parser.parse_args(argv)
    defaults = {"seed": 0, "epochs": 3, "learning_rate": 5e-4, "max_steps": None}
    print("measured: " + json.dumps(train(options.recipe, options.run, options.model, defaults | options.options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
