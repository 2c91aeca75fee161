"""Measures one row of the training benchmark, in a process that does nothing else."""

from __future__ import annotations

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


def prepare(work: Path, model: Path, profile: Profile, text: str, layers: int) -> dict[str, Any]:
    """Writes what all systems share, the reference losses among it, and measures the machine.

    Args:
        work: folder of the benchmark.
        model: folder of the model; it is written where there is none.
        profile: of the machine.
        text: source of the dialogues.
        layers: of a model that is written.

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
    rows = training_rows(work)

    base = peers.load_base(model, dtype)
    skeleton = skeleton_of(load_config(Model(name=str(model))))
    from peft import get_peft_model

    agreement.write_reference(get_peft_model(base, peers.lora_config()), rows[: profile.checked], work / REFERENCE)
    linear = linear_layers(skeleton)
    return {
        "device": machine.device_name(),
        "compute_dtype": dtype,
        "matrix_flops": rate,
        "matrix_size": size,
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "linear_parameters": sum(inputs * outputs for inputs, outputs in linear.values()),
        "layers": len({name.split(".h.")[1].split(".")[0] for name in linear}),
        "dialogues": len(rows),
        "replies": sum(len(row["reply_spans"]) for row in rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "supervised_tokens": sum(end - start for row in rows for start, end in row["reply_spans"]),
    }


def training_rows(work: Path) -> list[Row]:
    """What every system trains on."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(work / "rows" / "dataset" / "train"))
    return list(dataset.select_columns(["input_ids", "labels", "reply_spans"]))


def run_script(name: str, argv: list[str]) -> None:
    """Raises:
    KestrelError: the script failed; it has said why.
    """
    if script(name).main(argv):
        raise KestrelError(f"{name}.py {' '.join(argv)} failed")


def measure(system: System, work: Path, model: Path, checked: int, dtype: str) -> dict[str, Any]:
    """Checks a system's losses and times its steps.

    Returns:
        `seconds`, `positions` and `peak_bytes` of the timed steps; `dialogues`, `tokens` (each dialogue's once, whatever
        is computed again) and `real` (tokens that are no padding) of the same; what the check found.

    Raises:
        ProofError: the losses do not agree with the reference.
        OutOfMemoryError: on a GPU.
    """
    rows = training_rows(work)
    here = _kestrel if system.kind == "kestrel" else _peer
    return here(system, work, model, rows, rows[:checked], dtype)


def _kestrel(
    system: System, work: Path, model: Path, rows: list[Row], checked: list[Row], dtype: str
) -> dict[str, Any]:
    """preprocess.py and train.py as a user runs them; only the Trainer's `train` is watched."""
    from kestrel.training.trainer import DialogueTrainer

    found: dict[str, Any] = {}
    own_train: Callable[..., Any] = DialogueTrainer.train

    def train(trainer: DialogueTrainer, *given: Any, **named: Any) -> Any:
        def loss(rows: list[Row]) -> torch.Tensor:
            arrays = [{name: np.asarray(row[name]) for name in ("input_ids", "labels")} for row in rows]
            return trainer.training_step(trainer.model, trainer.inputs_of(arrays))

        def loss_of(number: int, span: tuple[int, int], row: Row) -> float:
            return float(loss([row]))

        def backward() -> None:
            loss(checked)

        reference = work / REFERENCE
        found["loss_difference"] = agreement.check(system.name, trainer.model, checked, loss_of, reference, dtype)
        found["gradient_difference"] = agreement.check_gradient(system.name, trainer.model, backward, reference, dtype)
        watch = machine.Stopwatch(trainer.model, system.warmup, system.steps)
        trainer.add_callback(watch)
        result = own_train(trainer, *given, **named)
        first, last = system.warmup, system.warmup + system.steps
        until = [0, *trainer.tokens_until.tolist()]
        found["tokens"] = found["real"] = until[last] - until[first]
        found["dialogues"] = sum(len(trainer.dialogues_of_step(step + 1)) for step in range(first, last))
        found.update(watch.readings())
        return result

    DialogueTrainer.train = train
    argv = arguments(work, model, system, dtype)
    run_script("preprocess", argv)
    run_script("train", argv)
    return found


def _peer(system: System, work: Path, model: Path, rows: list[Row], checked: list[Row], dtype: str) -> dict[str, Any]:
    """A peer's trainer. An epoch is extrapolated from examples whose lengths are distributed as all lengths are."""
    base = peers.load_base(model, dtype)
    trainer, epoch = peers.trainer_of(system, base, model, work / system.name, rows)
    loss_of = peers.loss_by(system, trainer, checked)
    difference = agreement.check(system.name, trainer.model, checked, loss_of, work / REFERENCE, dtype)
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
    timed = batches[system.warmup : system.warmup + system.steps]
    share = sum(count for count, _ in timed) / epoch  # of an epoch that was timed
    return {
        "loss_difference": difference,
        "dialogues": share * len(rows),
        "tokens": share * sum(len(row["input_ids"]) for row in rows),
        "real": sum(real for _, real in timed),
        **watch.readings(),
    }
