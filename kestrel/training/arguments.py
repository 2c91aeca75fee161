"""How the library's Trainer is set up for a run, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.training.trackers import TrackedArguments, check_trackers, keep_paths_back, naming, told_of


def arguments_for(settings: Settings, steps: int, output: Path, on_gpu: bool) -> TrainingArguments:
    """The Trainer's arguments for a run of `steps` optimizer steps."""
    training = settings.training
    every = math.ceil(steps / training.evaluations)
    arguments = TrackedArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.lr_schedule, training.lr_schedule),
        warmup_steps=round(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        seed=settings.seed,
        data_seed=settings.seed,
        fp16=settings.quantization.compute_dtype == "float16" and on_gpu,
        use_cpu=not on_gpu,
        logging_steps=min(training.logging_steps, every),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=max(2, training.keep_checkpoints),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=training.report_to or "none",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        **naming(settings),
    )
    arguments.told = told_of(settings)
    # With several GPUs in sight, the Trainer (5.23) would split each batch among them by DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def silence(trainer: Trainer) -> None:
    """Leaves the Trainer's own bar and its printing of dicts away, for which there is `callbacks.Progress`, and keeps
    local paths from the trackers."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    keep_paths_back(trainer)


def check_machine(names: Sequence[str], optimizer: str) -> None:
    """Refuses a tracker that is not installed and an optimizer that needs a GPU, before anything is loaded.

    Raises:
        KestrelError: naming it.
    """
    if optimizer.startswith("paged") and not torch.cuda.is_available():
        raise KestrelError(f"training.optimizer: {optimizer} needs a GPU; use adamw_torch")
    check_trackers(names)
