"""The model that is trained, the optimization from its first step or a checkpoint to its end, and the adapter that results."""

from __future__ import annotations

import time
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  what torch raises where it refuses
from typing import TYPE_CHECKING, Any

import torch

from kestrel.adapter.lora import add_lora, load_adapter
from kestrel.adapter.proof import prove_loaded, save_and_prove
from kestrel.config.settings import Settings
from kestrel.errors import Interrupted, KestrelError
from kestrel.model.base import check_context, device, device_name, load_base, note_on_untrained_end
from kestrel.model.host_embedding import move_embedding_to_host
from kestrel.model.layer_proof import prove_layers
from kestrel.model.loss import attach_token_nll, collate, fast_layers_of, prove_loss
from kestrel.model.quantization import Audit
from kestrel.prompt.prompt import Prompt
from kestrel.runtime import distributed
from kestrel.runtime.disk_space import room_for, training_bytes
from kestrel.runtime.machine import memory_peak
from kestrel.runtime.manifest import sha256_of
from kestrel.runtime.output import print_marked
from kestrel.runtime.signals import on_signals
from kestrel.runtime.training_log import plot_loss
from kestrel.training import checkpoints
from kestrel.training.initial import Initial
from kestrel.training.progress import StopOnSignal
from kestrel.training.sharding import shard
from kestrel.training.trainer import DialogueTrainer
from kestrel.training.verdict import WORSE, verdict

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from kestrel.planning.passes import Plan


def load_trainable(
    settings: Settings,
    plan: Plan,
    sharded: bool,
    longest: int,
    validation: Dataset,
    prompt: Prompt,
    initial: Initial | None,
) -> tuple[PeftModel, Audit]:
    """Loads the base, adds the adapter, and proves the loss on one dialogue; prints what was loaded and proven.

    Args:
        plan: what the layers recompute, and where the embedding is.
        sharded: split the base over the processes.
        longest: tokens of the longest dialogue.
        initial: the adapter to begin from; None for a fresh one.

    Raises:
        KestrelError: the base cannot be loaded, its context is too short, or it lacks the layers to adapt.
        ProofError: the base is not what the settings ask for, its loss is wrong, or the initial adapter computes
            something else than in its training.
    """
    base, audit = load_base(settings, to_be_sharded=sharded)
    check_context(base, longest)
    print(f"base: {audit.line()}")
    if plan.embedding_on_host:
        move_embedding_to_host(base)
    if untrained := note_on_untrained_end(base, prompt):
        print(f"note: {untrained}")
    if initial is None:
        model = add_lora(base, settings.lora, settings.seed)
    else:
        model = load_adapter(base, initial.folder, settings.lora.dropout)
    begun = f", begun from {initial.name}" if initial else ""
    targets = settings.lora.target_modules
    layers = targets if isinstance(targets, str) else ", ".join(targets)
    print(f"adapter: {model.get_nb_trainable_parameters()[0]:,} trainable parameters on {layers}{begun}")
    if sharded:
        print(shard(model))
    attach_token_nll(model, plan.recompute)
    if plan.recompute == "dense" and fast_layers_of(model) is None:
        print("note: training.recompute: dense is none for the layers of transformers")
    prompt.ends_also_at(model.generation_config.eos_token_id)
    if initial is not None:
        print(prove_loaded(model, initial.manifest, prompt.identity(), settings.quantization.compute_dtype))
    batch = {name: tensor.to(device()) for name, tensor in collate([validation[0]], pad_id=prompt.end_id).items()}
    prove_loss(model, batch, settings.quantization.compute_dtype)
    print(prove_layers(model, batch, settings.quantization.compute_dtype))
    return model, audit


def fit(trainer: DialogueTrainer, stop: StopOnSignal, settings: Settings, resume: Path | None, restart: str) -> float:
    """Trains from a checkpoint, or from step 0, to the end. Returns the seconds it took.

    Args:
        resume: the checkpoint; newer ones are deleted. None deletes all and starts at step 0.
        restart: the command that starts again from step 0, for messages.

    Raises:
        Interrupted: a signal stopped it, after a checkpoint.
        KestrelError: no disk space or memory, or a checkpoint that cannot be read.
    """
    if trainer.args.device.type == "cuda":
        trainer.try_largest_pass()
    folder, steps, began = Path(trainer.args.output_dir), trainer.args.max_steps, time.monotonic()
    kept, vocabulary = max(2, settings.training.keep_checkpoints), len(trainer.processing_class)
    needed = training_bytes(trainer.model.get_nb_trainable_parameters()[0], vocabulary, steps, kept, folder)
    room = room_for("checkpoints, logs and adapter", needed, folder.parent)
    with room, on_signals(stop.on_signal):
        # Only now, when nothing is left that could refuse the run, are other checkpoints deleted.
        if distributed.is_first():
            checkpoints.remove_newer(folder, checkpoints.step_of(resume) if resume else 0)
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except UnpicklingError as error:  # the Trainer reads tensors and plain values, and runs no code
            raise KestrelError(
                "the checkpoint holds more than tensors and plain values, and was not read "
                f"({str(error).splitlines()[0]}); start again with: {restart}"
            ) from None
    if stop.received is not None and trainer.state.global_step < steps:
        raise Interrupted(
            stop.received, f"stopped at step {trainer.state.global_step}; {stop.command} resumes from there"
        )
    return time.monotonic() - began


def save(
    trainer: DialogueTrainer,
    settings: Settings,
    prompt: Prompt,
    fingerprint: dict[str, Any],
    audit: dict[str, Any],
    seconds: float,
    initial: Initial | None,
) -> None:
    """Writes the plot of the losses and the adapter; prints the best validation loss and what was proven."""
    run, state, model = Path(settings.run_dir), trainer.state, trainer.model
    log = run / "logs" / "training.jsonl"
    plot_loss(log, run / "logs" / "loss.png")
    facts = {
        "audit": audit,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "steps": state.global_step,
        "tokens": int(trainer.tokens_until[state.global_step - 1]),
        "best_step": state.best_global_step,
        "eval_loss": state.best_metric,
        "training_log": sha256_of(log),
        "hardware": f"{distributed.world_size()} × {device_name()}",
        **({"history": fingerprint["history"]} if "history" in fingerprint else {}),
        **({"init_adapter": initial.facts()} if initial else {}),
    }
    proof = save_and_prove(model, prompt, settings, run / "adapter", fingerprint, facts)
    on_gpu = torch.cuda.is_available()
    peak = (torch.cuda.max_memory_allocated() if on_gpu else memory_peak()) / 2**30
    losses = [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
    print(
        f"best validation loss {state.best_metric:.4f} at step {state.best_global_step} of {state.global_step}, "
        f"{losses[0][1]:.4f} at first; {facts['tokens']:,} tokens, {seconds:.0f} s in this process"
        f", {peak:.1f} GiB of {'GPU ' if on_gpu else ''}memory at the peak"
    )
    if losses[0][0] == 0 and len(losses) > 1:  # else begun by a version that did not evaluate before the first step
        print_marked(words := verdict(losses, settings.training, str(log.with_name("loss.png"))), WORSE in words)
    print(f"proven: {proof}")
    print(f"wrote {run / 'adapter'}")
