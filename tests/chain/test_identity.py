"""The same inputs give the same bytes, wherever, whenever and by whomever the scripts are run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from hub_server import serving
from hub_state import Hub
from make_models import write_base, write_config, write_corpus
from scripts import snapshot

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import preprocess, train\n"
    "sys.exit(preprocess.main(sys.argv[1:]) or train.main(sys.argv[1:]))"
)
ANOTHER = {"LC_ALL": "C", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7", "USER": "other"}


def made(folder: Path, hub: Hub, offline: bool, elsewhere: bool, another: bool) -> dict[str, bytes]:
    """What preprocess.py and train.py make in one process, in which libraries know from the start who and where they are."""
    place = folder / f"{offline:d}{elsewhere:d}{another:d}"
    (place / "cwd").mkdir(parents=True)
    config = write_config(place / "c.yaml", folder / "base", folder / "corpus", place / "run", "")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else hub.environment(place / "home", None)
    environment |= {"HOME": str(place), **(ANOTHER if another else {})}
    becoming = (
        ["unshare", "--user", "--map-user=12345", "--map-group=12345"] if another and can_become_another() else []
    )
    command = [*becoming, sys.executable, "-c", CODE, "--config", str(config), "--training.max_steps", "4"]
    cwd = place / "cwd" if elsewhere else ROOT
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = ("adapter/", "dataset/manifest", "dataset/statistics", "logs/training", "samples")
    return {name: content for name, content in snapshot(place / "run").items() if name.startswith(kept)}


def can_become_another() -> bool:
    """Whether the kernel lets this process be user 12345 in a namespace of its own; else only names and places change."""
    command = ["unshare", "--user", "--map-user=12345", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_wherever_and_whoever_makes_them_adapter_and_manifests_are_the_same(tmp_path: Path) -> None:
    """Online or offline, in another working directory, as another user in another time zone, locale and order of hashes.

    Of the eight combinations four, in which any two of the three meet in every way.
    """
    write_base(tmp_path / "base")
    write_corpus(tmp_path / "corpus", dialogues=16, candidates=True)
    with serving() as hub, ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(
            lambda ways: made(tmp_path, hub, *ways, ways[0] ^ ways[1]), product((False, True), repeat=2)
        )
    assert json.loads(first["adapter/manifest.json"])["files"]
    for files in others:
        assert files.keys() == first.keys()
        assert [name for name in first if files[name] != first[name]] == []
