"""Answers a split as the adapter and as the base, and scores how likely they find the references.

    python generate.py --config configs/falcon-7b.yaml
    python generate.py --config configs/falcon-7b.yaml --generation.split validation --generation.max_dialogues 50
    python generate.py --config configs/falcon-7b.yaml --dry-run                 print the memory that answers take

Loads the base once, checks that prompt, base and adapter are the ones that were trained, and writes one line per reply to
RUN/generations/SPLIT.SYSTEM.jsonl. Above 1, generation.persona_orders adds a file SPLIT.SYSTEM-orderK.jsonl for each shuffle
of the persona's sentences. After an interruption the same command resumes.
"""

from __future__ import annotations

import kestrel.interrupts  # noqa: F401  before all others: from here on Ctrl-C is quiet

import argparse
import contextlib
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from datasets import Dataset

    from kestrel.config.settings import Settings
    from kestrel.generation.files import GenerationsFile
    from kestrel.prompt.prompt import Prompt

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--dry-run", {"action": "store_true", "help": "print what answering takes; load no weights, write nothing"})
]


def generate(settings: Settings, options: argparse.Namespace) -> None:
    from kestrel.data.other_runs import require_dataset
    from kestrel.runtime.manifest import require_artifact

    run, chosen, dry_run = Path(settings.run_dir), settings.generation, options.dry_run
    preprocess, train = f"python preprocess.py {options.again}", f"python train.py {options.again}"
    require_dataset(settings, preprocess)
    if "adapter" in chosen.systems and settings.model.adapter is None and not dry_run:
        require_artifact(run / "adapter", "adapter", f"train it with: {train}")

    from kestrel.adapter.compute_dtype import with_compute_dtype
    from kestrel.adapter.load import load_model
    from kestrel.adapter.open import open_adapter
    from kestrel.data.dataset import load_split, open_dataset
    from kestrel.generation.files import files_to_make, what_decides
    from kestrel.model.base import base_identity, check_context, open_base
    from kestrel.planning import answering
    from kestrel.prompt.load import load_prompt
    from kestrel.runtime import distributed, rendezvous
    from kestrel.runtime.disk_space import answers_bytes, require_room
    from kestrel.runtime.manifest import identity_of

    rendezvous.join_processes(settings)
    settings = with_compute_dtype(settings, planned=dry_run and settings.training.device_memory is not None)
    prompt = load_prompt(settings)
    settings, config = open_base(settings, prompt)
    dataset_folder, dataset_manifest = open_dataset(settings, prompt, preprocess)
    rows = load_split(dataset_folder, chosen.split, preprocess)
    if chosen.max_dialogues is not None:
        rows = rows.select(range(min(chosen.max_dialogues, len(rows))))
    if dry_run:
        answering.report(settings, config, prompt, rows)
        return
    base = base_identity(settings.model, config)
    adapter = open_adapter(settings, prompt, base, train) if "adapter" in chosen.systems else None

    common = what_decides(settings, identity_of(dataset_manifest), base, prompt.identity()["sha256"])
    files = files_to_make(settings, common, adapter[1] if adapter else None)
    up_to_date = distributed.broadcast_from_first(lambda: [file.path for file in files if file.is_up_to_date()])
    for path in up_to_date:
        print(f"{path} is up to date")
    if not (missing := [file for file in files if file.path not in up_to_date]):
        return
    require_room("generations", answers_bytes(rows, chosen.max_new_tokens, len(missing)), run / "generations")
    model = load_model(settings, prompt, adapter)
    check_context(model, max((spans[-1][0] for spans in rows["reply_spans"]), default=0), chosen.max_new_tokens)
    for file in missing:
        with model.disable_adapter() if file.system == "base" and adapter else contextlib.nullcontext():
            write_file(model, prompt, rows, settings, file)


def write_file(model: Any, prompt: Prompt, rows: Dataset, settings: Settings, file: GenerationsFile) -> None:
    """Answers all rows into one file, with a progress bar, and records it."""
    from tqdm import tqdm

    from kestrel.generation.answers import print_left_out, write_answers
    from kestrel.runtime import distributed
    from kestrel.runtime.disk_space import answers_bytes, room_for

    began, chosen = time.monotonic(), settings.generation
    room = room_for("generations", answers_bytes(rows, chosen.max_new_tokens, 1), file.path.parent)
    replies = [0, *accumulate(sum(turn["speaker"] == "self" for turn in turns) for turns in rows["turns"])]
    with room, tqdm(total=replies[-1], desc=file.label, unit=" replies", disable=None) as bar:
        shards = write_answers(model, prompt, rows, chosen, settings.seed, file, bar.update)
        for number, done in enumerate(shards):
            bar.update(replies[done] - bar.n)  # of other processes, or left out
            if done and not number:
                print(f"{file.label}: resuming after {done} dialogues")
    if distributed.is_first():
        file.record(settings)
        print(f"wrote {file.path} in {time.monotonic() - began:.0f} s")
        print_left_out(rows, file.path, chosen.candidates)


def main(argv: list[str] | None = None) -> int:
    return run_script("generate.py", __doc__, generate, argv, OPTIONS, together=True)


if __name__ == "__main__":
    sys.exit(main())
