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

    from kestrel.adapter import open_adapter, prove_loaded
    from kestrel.answers import write_answers
    from kestrel.artifacts import identity_of, sha256_of, sha256_of_json
    from kestrel.dataset import load_split, open_dataset
    from kestrel.loss import install
    from kestrel.model import base_identity, load_base, load_config, load_tokenizer
    from kestrel.prompt import Prompt

    run, chosen = Path(settings.run_dir), settings.generation
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    remedy = f"python preprocess.py --config {options.config}"
    dataset_folder, dataset_manifest = open_dataset(settings, prompt, remedy)
    rows = load_split(dataset_folder, chosen.split, remedy)
    if chosen.max_dialogues is not None:
        rows = rows.select(range(min(chosen.max_dialogues, len(rows))))
    adapter_folder = Path(settings.model.adapter or run / "adapter")

    common = {
        "dataset": identity_of(dataset_manifest),
        "base": base_identity(settings.model, load_config(settings.model)),
        "prompt_sha256": prompt.identity()["sha256"],
        "quantization": settings.quantization.model_dump(),
        # How many prompts share a batch changes nothing but speed; who answers is in the file's name.
        "generation": chosen.model_dump(exclude={"tokens_per_step", "systems"}),
        "seed": settings.seed,
    }
    model: Any
    model, audit = load_base(settings)
    print(f"base: {audit.line()}")
    adapter_manifest = None
    if "adapter" in chosen.systems:
        model, adapter_manifest = open_adapter(
            model, adapter_folder, prompt, settings, f"python train.py --config {options.config}"
        )
        print(f"adapter: {adapter_folder}")
    install(model)
    if adapter_manifest is not None:
        prove_loaded(model, adapter_manifest, prompt.identity(), settings.quantization.compute_dtype)
        print("proven: it computes what the trained adapter did, over the same prompt")

    files = {}
    for system in chosen.systems:
        made_from = {**common, "system": system}
        if system == "adapter" and adapter_manifest is not None:
            made_from["adapter"] = identity_of(adapter_manifest)
        path = run / "generations" / f"{chosen.split}.{system}.jsonl"
        plain = (
            model.disable_adapter() if system == "base" and adapter_manifest is not None else contextlib.nullcontext()
        )
        began = time.monotonic()
        with plain, tqdm(total=len(rows), desc=system, unit=" dialogues", disable=None) as bar:
            done_before = None
            for done in write_answers(model, prompt, rows, chosen, path, sha256_of_json(made_from)):
                if done_before is None and done:
                    print(f"{system}: going on after {done} dialogues")
                done_before = done
                bar.update(done - bar.n)
        seconds = time.monotonic() - began
        files[path.name] = {"sha256": sha256_of(path), "made_from": made_from}
        print(f"wrote {path} in {seconds:.0f} s")
    record(run / "generations", files, settings)


def record(folder: Path, files: dict[str, Any], settings: Settings) -> None:
    """Writes generations/manifest.json, keeping what it says of files that this call did not make."""
    from kestrel.artifacts import MANIFEST, read_json, sha256_of, write_manifest

    former = read_json(folder / MANIFEST, "") if (folder / MANIFEST).exists() else {}
    kept = {
        name: facts
        for name, facts in former.get("generations", {}).items()
        if name not in files and (folder / name).exists() and sha256_of(folder / name) == facts["sha256"]
    }
    write_manifest(
        folder,
        "generations",
        settings={"generation": settings.generation.model_dump(), "seed": settings.seed},
        made_from={},
        generations={**kept, **files},
    )


def main(argv: list[str] | None = None) -> int:
    return run_script("generate.py", __doc__, generate, argv)


if __name__ == "__main__":
    sys.exit(main())
