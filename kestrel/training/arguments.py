"""How the library's Trainer is set up for a run, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.model.base import device
from kestrel.planning.passes import Plan
from kestrel.prompt.prompt import Prompt
from kestrel.runtime import distributed
from kestrel.training import callbacks
from kestrel.training.initial import BeginsWhereItEnded
from kestrel.training.progress import Progress, StopOnSignal
from kestrel.training.samples import Samples
from kestrel.training.sharding import is_sharded
from kestrel.training.trackers import (
    TrackedArguments,
    check_trackers,
    hide_paths,
    run_name_arguments,
    text_writer,
    tracked_settings,
)
from kestrel.training.trainer import DialogueTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


def arguments_for(
    settings: Settings,
    steps: int,
    output: Path,
    on_gpu: bool,
    history: Sequence[dict[str, Any]] = (),
    resumed: bool = False,
) -> TrainingArguments:
    """The Trainer's arguments for a run of `steps` optimizer steps.

    Args:
        output: folder of the checkpoints.
        history: what decided the training of each earlier stretch, where a finished run is extended.
        resumed: whether the run goes on from a checkpoint.
    """
    training = settings.training
    every = math.ceil((steps - (history[-1]["steps"] if history else 0)) / training.evaluations)
    arguments = TrackedArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=history[0]["learning_rate"] if history else training.learning_rate,  # with `learning_rate_factor`
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        seed=settings.seed,
        data_seed=settings.seed,
        fp16=settings.quantization.compute_dtype == "float16" and on_gpu,
        use_cpu=not on_gpu,
        logging_steps=min(training.logging_steps, every),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=max(2, training.keep_checkpoints),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=training.report_to or "none",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        **run_name_arguments(settings),
    )
    arguments.tracked = tracked_settings(settings)
    # With several visible GPUs, the Trainer (5.23) would split each batch over them by DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def build_trainer(
    settings: Settings,
    steps: list[Any],
    fingerprint: dict[str, Any],
    plan: Plan,
    model: PeftModel,
    prompt: Prompt,
    rows: Dataset,
    validation: Dataset,
    resumed: bool,
    first_loss: float | None,
) -> tuple[DialogueTrainer, StopOnSignal]:
    """The Trainer with its callbacks, and the callback that handles signals.

    Args:
        first_loss: the validation loss to expect at step 0, where it is known.

    Raises:
        KestrelError: a sample's prompt and answer are longer than the model's context.
    """
    run, on_gpu, patience = Path(settings.run_dir), device().type == "cuda", settings.training.early_stopping
    trainer = DialogueTrainer(
        settings,
        steps,
        fingerprint,
        plan,
        model=model,
        args=arguments_for(settings, len(steps), run / "checkpoints", on_gpu, fingerprint.get("history", []), resumed),
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=prompt.tokenizer,
    )
    for own in (PrinterCallback, ProgressCallback):  # progress.Progress replaces both
        trainer.remove_callback(own)
    hide_paths(trainer)
    write_text = text_writer(trainer)
    samples = Samples(model, prompt, validation, settings, write_text)
    stop = StopOnSignal(settings.training.resume)
    chosen: list[TrainerCallback] = [callbacks.Schedule()]
    if distributed.is_first():
        steps_per_epoch = math.ceil(len(rows) / settings.training.batch_size)
        log = callbacks.JsonLines(run / "logs" / "training.jsonl", trainer.tokens_until)
        chosen += [Progress(trainer, steps_per_epoch), log]
        chosen += (
            [] if is_sharded(model) else [samples]
        )  # the first process alone computes no answer of a sharded model
    chosen += [BeginsWhereItEnded(first_loss, settings.quantization.compute_dtype)] if first_loss is not None else []
    begin = callbacks.begin_of(fingerprint.get("history", []))
    chosen += [callbacks.EarlyStopping(patience, begin)] if patience else []
    for callback in (*chosen, stop, callbacks.Guard(trainer)):  # Guard checks before what the others request is done
        trainer.add_callback(callback)
    return trainer, stop


def check_machine(names: Sequence[str], optimizer: str) -> None:
    """Refuses a tracker that is not installed and an optimizer that needs a GPU, before anything is loaded."""
    if optimizer.startswith("paged") and not torch.cuda.is_available():
        raise KestrelError(f"training.optimizer: {optimizer} needs a GPU; use adamw_torch")
    check_trackers(names)
