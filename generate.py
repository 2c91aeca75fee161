"""Answers a split as the adapter and as the base, and scores how likely they find the references.

    python generate.py --config configs/falcon-7b.yaml
    python generate.py --config configs/falcon-7b.yaml --generation.split validation --generation.max_dialogues 50

Loads the base once, checks that prompt, base and adapter are the ones that were trained, and writes a line for every
reply to RUN/generations/SPLIT.SYSTEM.jsonl. The same command goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from kestrel.command_line import run_script
from kestrel.settings import Settings


def generate(settings: Settings, options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from kestrel.adapter import prove_loaded, read_adapter
    from kestrel.answers import write_answers
    from kestrel.artifacts import identity_of, sha256_of_json
    from kestrel.dataset import load_split, open_dataset
    from kestrel.loss import install
    from kestrel.model import base_identity, check_context, load_adapter, load_base, load_config, load_tokenizer
    from kestrel.prompt import Prompt

    run, chosen = Path(settings.run_dir), settings.generation
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    remedy = f"python preprocess.py --config {options.config}"
    dataset_folder, dataset_manifest = open_dataset(settings, prompt, remedy)
    rows = load_split(dataset_folder, chosen.split, remedy)
    if chosen.max_dialogues is not None:
        rows = rows.select(range(min(chosen.max_dialogues, len(rows))))

    # Sampling draws for a whole batch at once; otherwise how many prompts share a batch changes nothing but speed.
    ignored = {"systems"} if chosen.do_sample else {"systems", "tokens_per_step"}
    common = {
        "dataset": identity_of(dataset_manifest),
        "base": base_identity(settings.model, load_config(settings.model)),
        "prompt_sha256": prompt.identity()["sha256"],
        "quantization": settings.quantization.model_dump(),
        "generation": chosen.model_dump(exclude=ignored),
        "seed": settings.seed,
    }
    adapter_folder = Path(settings.model.adapter or run / "adapter")
    adapter_manifest = None
    if "adapter" in chosen.systems:
        command = f"python train.py --config {options.config}"
        adapter_manifest = read_adapter(
            adapter_folder, prompt.identity(), common["quantization"], common["base"], command
        )
    made_from = {system: {**common, "system": system} for system in chosen.systems}
    if adapter_manifest is not None:
        made_from["adapter"]["adapter"] = identity_of(adapter_manifest)
    folder = run / "generations"
    missing = [
        system for system in made_from if not up_to_date(folder, f"{chosen.split}.{system}.jsonl", made_from[system])
    ]
    for system in made_from.keys() - missing:
        print(f"{folder / f'{chosen.split}.{system}.jsonl'} is up to date")
    if not missing:
        return

    model: Any
    model, audit = load_base(settings)
    print(f"base: {audit.line()}")
    check_context(model, max((spans[-1][0] for spans in rows["reply_spans"]), default=0), chosen.max_new_tokens)
    if adapter_manifest is not None:
        model = load_adapter(model, adapter_folder)
        print(f"adapter: {adapter_folder}")
    install(model)
    if adapter_manifest is not None:
        prove_loaded(model, adapter_manifest, prompt.identity(), settings.quantization.compute_dtype)
        print("proven: it computes what the trained adapter did, over the same prompt")

    replies = sum(turn["speaker"] == "self" for turns in rows["turns"] for turn in turns)
    for system in missing:
        path = folder / f"{chosen.split}.{system}.jsonl"
        alone = model.disable_adapter() if system == "base" and adapter_manifest else contextlib.nullcontext()
        began = time.monotonic()
        with alone, tqdm(total=len(rows), desc=system, unit=" dialogues", disable=None) as bar:
            shards = write_answers(model, prompt, rows, chosen, settings.seed, path, sha256_of_json(made_from[system]))
            if done := next(shards):
                print(f"{system}: going on after {done} dialogues")
            bar.update(done)
            for done in shards:
                bar.update(done - bar.n)
        record(folder, path, made_from[system], settings)
        print(f"wrote {path} in {time.monotonic() - began:.0f} s")
    with open(path, encoding="utf-8") as file:
        left_out = replies - sum(1 for _ in file)
    if left_out:
        print(
            f"{left_out:,} of {replies:,} replies are left out: their exchange alone is longer than prompt.max_length"
        )


def up_to_date(folder: Path, name: str, made_from: dict[str, Any]) -> bool:
    """Whether a file of an earlier call is whole and is what this call would make."""
    from kestrel.artifacts import MANIFEST, read_json, sha256_of

    if not (folder / MANIFEST).exists() or not (folder / name).exists():
        return False
    known = read_json(folder / MANIFEST, f"delete {folder} and run this again")["generations"].get(name)
    return known == {"sha256": sha256_of(folder / name), "made_from": made_from}


def record(folder: Path, made: Path, made_from: dict[str, Any], settings: Settings) -> None:
    """Adds a finished file to generations/manifest.json, keeping what it says of others that are still as they were."""
    from kestrel.artifacts import MANIFEST, read_json, sha256_of, write_manifest

    former = read_json(folder / MANIFEST, f"delete {folder} and run this again") if (folder / MANIFEST).exists() else {}
    kept = {
        name: facts
        for name, facts in former.get("generations", {}).items()
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
    return run_script("generate.py", __doc__, generate, argv)


if __name__ == "__main__":
    sys.exit(main())
