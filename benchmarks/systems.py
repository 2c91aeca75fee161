"""Measures one row of the training benchmark, in a process that does nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import agreement, machine, peers
from benchmarks.agreement import Row
from benchmarks.profiles import Profile, System, arguments, read_dialogues, script, write_dialogues, write_model
from kestrel.errors import KestrelError

REFERENCE = "reference.pt"
_ROWS = "rows.json"


def prepare(work: Path, model: Path, profile: Profile, text: str, layers: int | None) -> dict[str, Any]:
    """Writes what all systems share, the reference losses among it, and measures the machine.

    Args:
        work: folder of the benchmark.
        model: folder of the model; it is written where there is none.
        profile: of the machine.
        text: source of the dialogues.
        layers: of a model that is written; None: the profile's.

    Returns:
        Facts for the record: device, matrix rate in FLOP/s, sizes of model and data.
    """
    from kestrel.config.settings import Model
    from kestrel.model.base import load_config, skeleton_of
    from kestrel.model.quantization import linear_layers

    dtype = machine.compute_dtype()
    size = machine.matrix_size()
    rate = machine.matrix_rate(size, dtype)
    dialogues = read_dialogues(text)
    if not (model / "config.json").exists():
        write_model(model, profile, dialogues, layers)
    write_dialogues(work / "dialogues", dialogues, profile.repeat)
    ours = next(system for system in profile.systems if system.kind == "kestrel")
    run_script("preprocess", arguments(work, model, replace(ours, name="rows"), dtype))
    rows = write_rows(work)

    base = peers.load_base(model, dtype)
    config = load_config(Model(name=str(model)))
    skeleton = skeleton_of(config)
    from peft import get_peft_model

    with_lora = get_peft_model(base, peers.lora_config(profile))
    agreement.write_reference(with_lora, rows[: profile.checked], work / REFERENCE)
    linear = linear_layers(skeleton)
    return {
        "device": machine.device_name(),
        "compute_dtype": dtype,
        "matrix_flops": rate,
        "matrix_size": size,
        "shape": profile.model,
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "linear_parameters": sum(inputs * outputs for inputs, outputs in linear.values()),
        "layers": config.num_hidden_layers,
        "dialogues": len(rows),
        "replies": sum(len(row["reply_spans"]) for row in rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "supervised_tokens": sum(end - start for row in rows for start, end in row["reply_spans"]),
    }


def write_rows(work: Path) -> list[Row]:
    """What every system trains on, also as JSON, since unsloth needs another version of datasets."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(work / "rows" / "dataset" / "train"))
    rows = list(dataset.select_columns(["input_ids", "labels", "reply_spans"]))
    (work / _ROWS).write_text(json.dumps(rows), encoding="utf-8")
    return rows


def run_script(name: str, argv: list[str]) -> None:
    """Raises:
    KestrelError: the script failed; it has said why.
    """
    if script(name).main(argv):
        raise KestrelError(f"{name}.py {' '.join(argv)} failed")


def measure(
    system: System, work: Path, model: Path, profile: Profile, dtype: str, process_began: float
) -> dict[str, Any]:
    """Checks a system's losses and gradient and times its steps.

    Args:
        process_began: in seconds since 1970.

    Returns:
        `seconds`, `positions` and `peak_bytes` of the timed steps; `dialogues`, `tokens` (each dialogue's once, whatever
        is computed again) and `real` (tokens that are no padding) of the same; `step_tokens` and `step_seconds` of each;
        what the check found.

    Raises:
        ProofError: the losses or the gradient do not agree with the reference.
        OutOfMemoryError: on a GPU.
    """
    rows = json.loads((work / _ROWS).read_text(encoding="utf-8"))
    if system.kind == "kestrel":
        return _kestrel(system, work, model, rows[: profile.checked], dtype, process_began)
    return _peer(system, work, model, profile, rows, dtype)


def _kestrel(
    system: System, work: Path, model: Path, checked: list[Row], dtype: str, process_began: float
) -> dict[str, Any]:
    """train.py as a user runs it, on what preprocess.py made; only the Trainer's `train` is watched."""
    from kestrel.training.trainer import DialogueTrainer

    found: dict[str, Any] = {}
    own_train: Callable[..., Any] = DialogueTrainer.train

    def train(trainer: DialogueTrainer, *given: Any, **named: Any) -> Any:
        began = time.time()
        found.update(_check_kestrel(system.name, trainer, checked, work / REFERENCE, dtype))
        machine.synchronize()
        checking = time.time() - began
        watch = machine.Stopwatch(trainer.model, system.warmup, system.steps)
        trainer.add_callback(watch)
        result = own_train(trainer, *given, **named)
        first, last = system.warmup, system.warmup + system.steps
        steps = np.diff([0, *trainer.tokens_until.tolist()])[first:last].tolist()
        found["step_tokens"], found["tokens"], found["real"] = steps, sum(steps), sum(steps)
        found["dialogues"] = sum(len(trainer.dialogues_of_step(step + 1)) for step in range(first, last))
        found.update(watch.readings())
        found["start_to_first_step_seconds"] = found["first_step_at"] - process_began - checking
        plan = trainer._plan
        found["tokens_per_step"], found["recompute"] = plan.tokens_per_step, plan.recompute
        found["estimated_bytes"] = plan.estimate.needed if plan.estimate else None
        return result

    DialogueTrainer.train = train
    dataset = ["--data.dataset", str(work / "rows" / "dataset")]
    run_script("train", [*arguments(work, model, system, dtype), *dataset])
    return found


def _check_kestrel(name: str, trainer: Any, checked: list[Row], reference: Path, dtype: str) -> dict[str, float]:
    """The differences of the losses and of the gradient from the reference's.

    Raises:
        ProofError: more than rounding lies between them.
    """

    def loss(rows: list[Row]) -> torch.Tensor:
        arrays = [{name: np.asarray(row[name]) for name in ("input_ids", "labels")} for row in rows]
        result: torch.Tensor = trainer.training_step(trainer.model, trainer.inputs_of(arrays))
        return result

    def loss_of(number: int, span: tuple[int, int], row: Row) -> float:
        return float(loss([row]))

    def backward() -> None:
        loss(checked)

    return {
        "loss_difference": agreement.check(name, trainer.model, checked, loss_of, reference, dtype),
        "gradient_difference": agreement.check_gradient(name, trainer.model, backward, reference, dtype),
    }


def _peer(system: System, work: Path, model: Path, profile: Profile, rows: list[Row], dtype: str) -> dict[str, Any]:
    """A peer's trainer. Where an example is a turn, an epoch is extrapolated from turns of all lengths."""
    trainer, epoch = peers.trainer_of(system, profile, model, work / system.name, rows, dtype)
    reference, checked = work / REFERENCE, rows[: profile.checked]
    found: dict[str, Any] = {}
    late = system.kind == "unsloth"  # what it compiles would be other code after other passes
    if not late:
        found.update(peers.check(system, trainer, checked, reference, dtype))
    watch = machine.Stopwatch(trainer.model, system.warmup, system.steps)
    trainer.add_callback(watch)
    collate, batches = trainer.data_collator, []

    def counted(examples: list[Row]) -> Any:
        batches.append(
            (
                sum(len(example.get("seq_lengths", [0])) for example in examples),
                sum(sum(example.get("attention_mask", [1] * len(example["input_ids"]))) for example in examples),
            )
        )
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()
    trainer.data_collator = collate
    if late:
        found.update(peers.check(system, trainer, checked, reference, dtype))
    first, last = system.warmup, system.warmup + system.steps
    passes = [batches[step * system.passes : (step + 1) * system.passes] for step in range(first, last)]
    counts, real = ([sum(pair[place] for pair in step) for step in passes] for place in (0, 1))
    share = sum(counts) / epoch  # of an epoch that was timed
    tokens = sum(len(row["input_ids"]) for row in rows)
    steps = real if peers.of_dialogues(system) else [count / epoch * tokens for count in counts]
    return {
        **found,
        "dialogues": share * len(rows),
        "step_tokens": steps,
        "tokens": sum(steps),
        "real": sum(real),
        **watch.readings(),
    }
