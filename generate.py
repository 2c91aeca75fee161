"""Answers a split as the adapter and as the base, and scores how likely they find the references.

    python generate.py --config configs/falcon-7b.yaml
    python generate.py --config configs/falcon-7b.yaml --generation.split validation --generation.max_dialogues 50

Loads the base once, checks that prompt, base and adapter are the ones that were trained, and writes a line for every
reply to RUN/generations/SPLIT.SYSTEM.jsonl; with generation.persona_orders above 1, to SPLIT.SYSTEM-orderK.jsonl for
each shuffle of the persona's sentences too. The same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from kestrel.config.settings import Settings
from kestrel.runtime.command_line import run_script


def generate(settings: Settings, options: argparse.Namespace) -> None:
    from kestrel.runtime.manifest import require_made

    run, chosen = Path(settings.run_dir), settings.generation
    remedy = f"python preprocess.py {options.again}"
    require_made(run / "dataset", "dataset", f"make it with: {remedy}")
    if "adapter" in chosen.systems and settings.model.adapter is None:
        require_made(run / "adapter", "adapter", f"train it with: python train.py {options.again}")

    from tqdm import tqdm

    from kestrel.adapter.lora import load_adapter
    from kestrel.adapter.open import open_adapter
    from kestrel.adapter.proof import prove_loaded
    from kestrel.data.dataset import load_split, open_dataset
    from kestrel.generation.answers import left_out, write_answers
    from kestrel.generation.files import name_in_order
    from kestrel.model.base import base_identity, check_context, load_base, load_config
    from kestrel.model.loss import attach_token_nll
    from kestrel.prompt.prompt import Prompt
    from kestrel.prompt.tokenizer import load_tokenizer
    from kestrel.runtime import distributed, rendezvous
    from kestrel.runtime.disk_space import answers_bytes, require_room, room_for
    from kestrel.runtime.manifest import identity_of, sha256_of_json

    rendezvous.join_processes(settings)
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    dataset_folder, dataset_manifest = open_dataset(settings, prompt, remedy)
    rows = load_split(dataset_folder, chosen.split, remedy)
    if chosen.max_dialogues is not None:
        rows = rows.select(range(min(chosen.max_dialogues, len(rows))))

    # How many prompts share a batch changes nothing but speed, unless the library samples, which draws for a whole batch.
    ignored = {"systems", "persona_orders", *(() if chosen.do_sample else ("tokens_per_step",))}
    common = {
        "dataset": identity_of(dataset_manifest),
        "base": base_identity(settings.model, load_config(settings.model)),
        "prompt_sha256": prompt.identity()["sha256"],
        "quantization": settings.quantization.model_dump(),
        "generation": chosen.model_dump(exclude=ignored),
        "seed": settings.seed,
    }
    adapter_manifest = None
    if "adapter" in chosen.systems:
        command = f"python train.py {options.again}"
        adapter_folder, adapter_manifest = open_adapter(settings, prompt.identity(), common["base"], command)
    folder = run / "generations"
    files: dict[Path, tuple[str, int, dict[str, Any]]] = {}  # system, order of the persona, what decides the answers
    for order in range(chosen.persona_orders):
        for system in chosen.systems:
            made_from = {**common, "system": system}
            if system == "adapter" and adapter_manifest is not None:
                made_from["adapter"] = identity_of(adapter_manifest)
            if order:
                made_from["persona_order"] = order
            files[folder / f"{chosen.split}.{name_in_order(system, order)}.jsonl"] = (system, order, made_from)
    missing = distributed.broadcast_from_first(
        lambda: [path for path, (*_, made_from) in files.items() if not up_to_date(path, made_from)]
    )
    for path in files:
        if path not in missing:
            print(f"{path} is up to date")
    if not missing:
        return

    texts = rows.select_columns(["persona", "turns"])
    require_room("generations", answers_bytes(texts, chosen.max_new_tokens, len(missing)), folder)

    model: Any
    model, audit = load_base(settings)
    print(f"base: {audit.line()}")
    check_context(model, max((spans[-1][0] for spans in rows["reply_spans"]), default=0), chosen.max_new_tokens)
    if adapter_manifest is not None:
        model = load_adapter(model, adapter_folder)
        print(f"adapter: {settings.model.adapter or adapter_folder}")
    attach_token_nll(model)
    if adapter_manifest is not None:
        print(prove_loaded(model, adapter_manifest, prompt.identity(), settings.quantization.compute_dtype))

    replies = sum(turn["speaker"] == "self" for turns in rows["turns"] for turn in turns)
    for path in missing:
        answering, order, made_from = files[path]
        label = name_in_order(answering, order)
        alone = model.disable_adapter() if answering == "base" and adapter_manifest else contextlib.nullcontext()
        room = room_for("generations", answers_bytes(texts, chosen.max_new_tokens, 1), folder)
        began = time.monotonic()
        with alone, room, tqdm(total=len(rows), desc=label, unit=" dialogues", disable=None) as bar:
            identity = sha256_of_json(made_from)
            shards = write_answers(model, prompt, rows, chosen, settings.seed, order, path, identity)
            if done := next(shards):
                print(f"{label}: going on after {done} dialogues")
            bar.update(done)
            for done in shards:
                bar.update(done - bar.n)
        if not distributed.is_first():
            continue
        record(path, made_from, settings)
        print(f"wrote {path} in {time.monotonic() - began:.0f} s")
        unanswered, unscored = left_out(rows, path)
        if unanswered:
            print(
                f"  {unanswered:,} of {replies:,} replies are left out: their exchange alone is longer than "
                "prompt.max_length"
            )
        if chosen.candidates and unscored:
            print(
                f"  {unscored:,} of {replies:,} replies have no candidate_nll and do not count in hits@1: the "
                "tokenizer reads a control token in one of their candidates"
            )


def recorded(folder: Path) -> dict[str, Any]:
    """What generations/manifest.json says of each file."""
    from kestrel.evaluation.provenance import recorded_generations
    from kestrel.runtime.manifest import MANIFEST

    if not (folder / MANIFEST).exists():
        return {}
    return recorded_generations(folder, f"delete {folder} and run this again")


def up_to_date(path: Path, made_from: dict[str, Any]) -> bool:
    """Whether a file of an earlier call is whole and is what this call would make."""
    from kestrel.runtime.manifest import sha256_of

    known = recorded(path.parent).get(path.name)
    return known is not None and path.exists() and known == {"sha256": sha256_of(path), "made_from": made_from}


def record(made: Path, made_from: dict[str, Any], settings: Settings) -> None:
    """Adds a finished file to generations/manifest.json, keeping what it says of others that are still as they were."""
    from kestrel.runtime.manifest import sha256_of, write_manifest

    folder = made.parent
    kept = {
        name: facts
        for name, facts in recorded(folder).items()
        if (folder / name).exists() and sha256_of(folder / name) == facts["sha256"]
    }
    write_manifest(
        folder,
        "generations",
        settings={"generation": settings.generation.model_dump(), "seed": settings.seed},
        made_from={},
        generations={**kept, made.name: {"sha256": sha256_of(made), "made_from": made_from}},
    )


def main(argv: list[str] | None = None) -> int:
    return run_script("generate.py", __doc__, generate, argv, together=True)


if __name__ == "__main__":
    sys.exit(main())
