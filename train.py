"""Trains a LoRA adapter on the dataset of a run.

    python train.py --config configs/falcon-7b.yaml
    python train.py --config configs/falcon-7b.yaml --training.resume never      start again from step 0
    python train.py --config configs/falcon-7b.yaml --dry-run                    print memory, steps and time

Loads the base in 4 bit and audits it, trains, keeps the adapter with the best validation loss in RUN/adapter, and
proves that the saved adapter is the trained one. After an interruption the same command resumes.
"""

from __future__ import annotations

import kestrel.interrupts  # noqa: F401  before all others: from here on Ctrl-C is quiet

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.config.settings import Settings

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--dry-run", {"action": "store_true", "help": "print what training will take; load no weights, write nothing"})
]
UNUSED = {"model.adapter": "train.py would ignore it; to begin from this adapter, name it in training.init_adapter"}


def train(settings: Settings, options: argparse.Namespace) -> None:
    from kestrel.data.other_runs import require_dataset

    run, preprocess = Path(settings.run_dir), f"python preprocess.py {options.again}"
    require_dataset(settings, preprocess)

    from kestrel.batching import steps_of_run
    from kestrel.data.dataset import lengths_of, load_split, open_dataset
    from kestrel.model.base import base_identity, open_base
    from kestrel.planning import dry_run, passes
    from kestrel.prompt.load import load_prompt
    from kestrel.runtime import distributed, rendezvous
    from kestrel.runtime.manifest import identity_of
    from kestrel.training import callbacks, checkpoints, objective
    from kestrel.training.arguments import build_trainer, check_machine
    from kestrel.training.fit import fit, load_trainable, save
    from kestrel.training.initial import open_initial
    from kestrel.training.sharding import led_by_first

    sharded = rendezvous.join_processes(settings)
    settings = checkpoints.with_recorded_dtype(settings, planned=options.dry_run)
    if not options.dry_run:
        check_machine(settings.training.report_to, settings.training.optimizer)
    prompt = load_prompt(settings)
    settings, config = open_base(settings, prompt)
    folder, manifest = open_dataset(settings, prompt, preprocess)
    rows, validation_rows = (load_split(folder, split, preprocess) for split in ("train", "validation"))
    lengths, chosen = lengths_of(rows), settings.training
    steps = steps_of_run(lengths, chosen.batch_size, chosen.epochs, chosen.max_steps, settings.seed)
    amount = f"{len(rows):,} dialogues, {int(lengths.sum()):,} tokens"
    print(f"{amount}; {len(steps):,} steps of up to {chosen.batch_size} dialogues")
    dialogues = passes.Dialogues(lengths, objective.tokens_in_loss(rows), steps)
    if options.dry_run:
        dry_run.report(settings, config, dialogues, sharded)
        return

    base, restart = base_identity(settings.model, config), f"python train.py {options.again} --training.resume never"
    settings, initial = open_initial(settings, prompt, base)
    identities = identity_of(manifest), base, prompt.identity()["sha256"]
    fingerprint = checkpoints.resume_fingerprint(settings, *identities, len(steps), initial.sha256 if initial else None)
    resume, history = distributed.broadcast_from_first(
        lambda: checkpoints.choose(chosen.resume, run / "checkpoints", fingerprint, restart)
    )
    fingerprint |= {"history": history} if history else {}
    if resume and callbacks.had_stopped_early(checkpoints.log_history(resume), chosen.early_stopping, history):
        steps = steps[: checkpoints.step_of(resume)]

    passes.limit_gpu_memory(settings)
    plan = passes.plan_passes(settings, config, dialogues, resume, sharded)
    passes.print_plan(settings, plan)
    longest = int(max(lengths.max(), lengths_of(validation_rows).max()))
    model, audit = load_trainable(settings, plan, sharded, longest, validation_rows, prompt, initial)
    first_loss = initial.expected_loss(identities[0]) if initial else None
    trainer, stop = build_trainer(
        settings, steps, fingerprint, plan, model, prompt, rows, validation_rows, resume is not None, first_loss
    )
    seconds = fit(trainer, stop, settings, resume, restart)
    with led_by_first(model):
        if distributed.is_first():
            save(trainer, settings, prompt, fingerprint, audit.as_json(), seconds, initial)


def main(argv: list[str] | None = None) -> int:
    return run_script("train.py", __doc__, train, argv, OPTIONS, together=True, unused=UNUSED)


if __name__ == "__main__":
    sys.exit(main())
