"""An adapter in a folder of its own, changed, and given to generate.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from experiment import Experiment
from publishing_runs import BASE

from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.manifest import files_below, with_own_hash

NAMED = ["--hub.base_model", BASE]


def as_peft_saves(trained: Experiment, folder: Path) -> Path:
    """The adapter as PEFT saves it: two files, no manifest, no prompt."""
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(trained.run / "adapter" / name, folder / name)
    change(folder, base_model_name_or_path=BASE)
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    write_json(path, {**read_json(path, ""), **values})
    if (folder / "manifest.json").exists():
        manifest = read_json(folder / "manifest.json", "")
        write_json(folder / "manifest.json", with_own_hash({**manifest, "files": files_below(folder)}))


def arguments(trained: Experiment, run_dir: Path, adapter: Path | str, *more: str) -> list[str]:
    chosen = ["--model.adapter", str(adapter), "--generation.max_dialogues", "1", "--generation.systems", "adapter"]
    if not run_dir.exists():
        trained.copy_to(run_dir)
    return trained.arguments("--run_dir", str(run_dir), *chosen, *more)
