"""Trains a LoRA adapter on the dataset of a run.

    python train.py --config configs/falcon-7b.yaml
    python train.py --config configs/falcon-7b.yaml --training.resume never      begin anew
    python train.py --config configs/falcon-7b.yaml --dry-run                    say what it will take

Loads the base in 4 bit and audits it, trains, keeps the adapter with the best validation loss in RUN/adapter, and
proves that what was saved is what was trained. The same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.config.settings import Settings

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--dry-run", {"action": "store_true", "help": "say what training will take, load no weights, write nothing"})
]


def train(settings: Settings, options: argparse.Namespace) -> None:
    from kestrel.runtime.manifest import require_artifact

    run, remedy = Path(settings.run_dir), f"python preprocess.py {options.again}"
    require_artifact(run / "dataset", "dataset", f"make it with: {remedy}")

    from kestrel.adapter.lora import add_lora
    from kestrel.adapter.proof import save_and_prove
    from kestrel.batching import steps_of_run
    from kestrel.data.dataset import lengths_of, load_split, open_dataset
    from kestrel.errors import Interrupted
    from kestrel.model.base import base_identity, check_context, device, load_base, load_config
    from kestrel.model.loss import attach_token_nll, collate, prove_loss
    from kestrel.planning import dry_run, passes
    from kestrel.prompt.prompt import Prompt
    from kestrel.prompt.tokenizer import load_tokenizer
    from kestrel.runtime import distributed, rendezvous
    from kestrel.runtime.disk_space import room_for, training_bytes
    from kestrel.runtime.manifest import identity_of, sha256_of
    from kestrel.runtime.training_log import plot_loss
    from kestrel.training import arguments, callbacks, checkpoints, objective, sharding
    from kestrel.training.samples import sampler
    from kestrel.training.trainer import DialogueTrainer

    sharded = rendezvous.join_processes(settings)
    if not options.dry_run:
        arguments.check_machine(settings.training.report_to, settings.training.optimizer)
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    dataset_folder, dataset_manifest = open_dataset(settings, prompt, remedy)
    train_rows = load_split(dataset_folder, "train", remedy)
    validation_rows = load_split(dataset_folder, "validation", remedy)
    lengths = lengths_of(train_rows)
    steps = steps_of_run(
        lengths, settings.training.batch_size, settings.training.epochs, settings.training.max_steps, settings.seed
    )
    print(
        f"{len(train_rows):,} dialogues, {int(lengths.sum()):,} tokens; {len(steps):,} steps of up to "
        f"{settings.training.batch_size} dialogues"
    )

    config = load_config(settings.model)
    dialogues = passes.Dialogues(lengths, objective.tokens_in_loss(train_rows), steps)
    if options.dry_run:
        dry_run.report(settings, config, dialogues)
        return
    base_id = base_identity(settings.model, config)
    meaning = checkpoints.resume_fingerprint(
        settings, identity_of(dataset_manifest), base_id, prompt.identity()["sha256"], len(steps)
    )
    resume = distributed.broadcast_from_first(
        lambda: find_checkpoint(settings, run / "checkpoints", meaning, f"python train.py {options.again}")
    )

    patience = settings.training.early_stopping
    if resume and patience and callbacks.evaluations_without_progress(checkpoints.history(resume)) >= patience:
        steps = steps[: checkpoints.step_of(resume)]  # it had stopped early: no step is left

    passes.limit_gpu_memory(settings)
    chosen = passes.plan_passes(settings, config, dialogues, resume)
    if chosen.estimate is not None:
        print(chosen.line())
    if not chosen.fits:
        print(f"warning: {passes.shortage(settings, chosen)}", file=sys.stderr)
    base, audit = load_base(settings, to_be_sharded=sharded)
    check_context(base, int(max(lengths.max(), lengths_of(validation_rows).max())))
    print(f"base: {audit.line()}")
    model = add_lora(base, settings.lora, settings.seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"adapter: {trainable:,} trainable parameters")
    if sharded:
        print(sharding.shard(model))
    attach_token_nll(model, chosen.recompute)
    probe = collate([validation_rows[0]], pad_id=prompt.end_id)
    prove_loss(
        model, {name: tensor.to(device()) for name, tensor in probe.items()}, settings.quantization.compute_dtype
    )

    stop = callbacks.StopOnSignal()
    answers = sampler(model, prompt, validation_rows, settings)  # the first process makes them, alone
    trainer = DialogueTrainer(
        settings,
        steps,
        meaning,
        chosen,
        model=model,
        args=arguments.arguments_for(settings, len(steps), run / "checkpoints", device().type == "cuda"),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=prompt.tokenizer,
        callbacks=[
            callbacks.Progress(),
            callbacks.BestCheckpoint(),
            callbacks.JsonLines(run / "logs" / "training.jsonl", lambda: trainer.tokens_until),
            *([] if sharded else [callbacks.Samples(run / "samples.jsonl", answers)]),
            *([callbacks.EarlyStopping(patience)] if patience else []),
            stop,
            callbacks.Guard(lambda: trainer),  # last: it looks before whatever the others ask for
        ],
    )
    arguments.silence(trainer)
    if device().type == "cuda":
        trainer.rehearse()
    began = time.monotonic()
    needed = training_bytes(
        trainable, len(prompt.tokenizer), len(steps), max(2, settings.training.keep_checkpoints), run / "checkpoints"
    )
    room = room_for("checkpoints, logs and adapter", needed, run)
    with (
        room,
        stop.listening(),
        checkpoints.refusing_pickles(f"python train.py {options.again} --training.resume never"),
    ):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.received is not None and trainer.state.global_step < len(steps):
        raise Interrupted(
            stop.received, f"stopped at step {trainer.state.global_step}; the same command goes on from there"
        )
    if not distributed.is_first():
        return
    seconds = time.monotonic() - began

    plot_loss(run / "logs" / "training.jsonl", run / "logs" / "loss.png")
    state = trainer.state
    facts: dict[str, Any] = {
        "audit": audit.as_json(),
        "trainable_parameters": trainable,
        "steps": state.global_step,
        "tokens": int(trainer.tokens_until[state.global_step - 1]),
        "best_step": state.best_global_step,
        "eval_loss": state.best_metric,
        "training_log": sha256_of(run / "logs" / "training.jsonl"),
    }
    if sharded:
        model = sharding.whole_again(model, settings)
    proof = save_and_prove(model, prompt, settings, run / "adapter", meaning, facts)
    print(
        f"best validation loss {state.best_metric:.4f} at step {state.best_global_step} of {state.global_step}; "
        f"{facts['tokens']:,} tokens, {seconds:.0f} s in this process{peak_memory()}"
    )
    print(f"proven: {proof}")
    print(f"wrote {run / 'adapter'}")


def peak_memory() -> str:
    """`, 9.7 GiB of GPU memory at the peak`, or nothing without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at the peak"


def find_checkpoint(settings: Settings, folder: Path, meaning: dict[str, Any], command: str) -> Path | None:
    """The checkpoint to go on from; others that are damaged or no longer wanted are removed."""
    from kestrel.errors import KestrelError
    from kestrel.training import checkpoints

    choice = settings.training.resume
    anew = f"{command} --training.resume never"
    if choice == "never":
        shutil.rmtree(folder, ignore_errors=True)
        return None
    found, damaged = checkpoints.newest_resumable(folder, meaning, anew)
    for line in damaged:
        print(f"warning: {line}", file=sys.stderr)
    if choice != "auto":
        if Path(choice).resolve().parent != folder.resolve() or not Path(choice).is_dir():
            there = ", ".join(sorted(path.name for path in folder.glob("checkpoint-*"))) or "none"
            raise KestrelError(f"training.resume: {choice} is no checkpoint of this run; in {folder} there are {there}")
        found = checkpoints.require_resumable(Path(choice), meaning, anew)
    if found is not None:
        print(f"going on from {found}")
    checkpoints.remove_newer(folder, checkpoints.step_of(found) if found else 0)
    return found


def main(argv: list[str] | None = None) -> int:
    return run_script("train.py", __doc__, train, argv, OPTIONS, together=True)


if __name__ == "__main__":
    sys.exit(main())
