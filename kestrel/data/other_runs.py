"""Which run beside this one has a data set that this run could use. Imports nothing heavy while there is no need."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import read_json
from kestrel.runtime.distributed import is_first
from kestrel.runtime.manifest import MANIFEST, require_artifact

# What also shapes a data set: its manifest has only hashes of it, which cannot be compared before the tokenizer is loaded.
_RECORDED_BY_THE_RUN = {"model": ("name", "revision"), "prompt": ("chat_template", "system", "labels")}


def require_dataset(settings: Settings, command: str) -> None:
    """Checks, before anything heavy is imported, that there is a data set.

    Args:
        command: what creates it, for the message.

    Raises:
        KestrelError: there is none; names one of another run that was made with the same settings.
    """
    remedy = f"make it with: {command}"
    if is_first() and not settings.dataset_dir.is_dir() and (found := _fitting(settings)):
        remedy += (
            f"\n  or use that of another run, made with the same settings: add --data.dataset {shlex.quote(str(found))}"
        )
    require_artifact(settings.dataset_dir, "dataset", remedy)


def _fitting(settings: Settings) -> Path | None:
    """The newest data set in a folder beside run_dir that was made of the same source, with the same model and prompt."""
    from kestrel.data.dataset import settings_that_shape

    expected, wanted = {**settings_that_shape(settings), "seed": None}, settings.model_dump()
    manifests = Path(settings.run_dir).parent.glob(f"*/dataset/{MANIFEST}")
    for manifest in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            recorded = {**read_json(manifest, "")["settings"], "seed": None}
            config = yaml.safe_load((manifest.parents[1] / "config.yaml").read_text(encoding="utf-8"))
            is_same = all(
                config[section][key] == wanted[section][key]
                for section, keys in _RECORDED_BY_THE_RUN.items()
                for key in keys
            )
        except (KestrelError, OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
            continue  # another program's folder, or a damaged one
        if recorded == expected and is_same:
            return manifest.parent.resolve() if manifest.parent.is_symlink() else manifest.parent
    return None
