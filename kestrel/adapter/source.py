"""An adapter's folder: whose it is, and what identifies it. Nothing heavy is imported, so evaluate.py can ask too."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kestrel.config.settings import is_hub_id
from kestrel.errors import KestrelError
from kestrel.hub import plain_hub_errors, use_cache_without_network
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, sha256_of

# All that an adapter consists of. Nothing else is downloaded, least of all pickles, and nothing else is published.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
CONFIG, WEIGHTS, PROMPT = "adapter_config.json", "adapter_model.safetensors", "prompt.json"
ADAPTER_FILES = (
    CONFIG,
    WEIGHTS,
    PROMPT,
    MANIFEST,
    *TOKENIZER_FILES,
)


def find_folder(name: str) -> Path:
    """The folder of model.adapter, downloaded where it is an id on the Hub.

    Raises:
        KestrelError: neither a folder with an adapter nor to be had from the Hub.
    """
    folder = Path(name)
    if folder.is_file():
        raise KestrelError(f"model.adapter {name} is a file; name the folder that it lies in, or an id on the Hub")
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise KestrelError(f"model.adapter {name}: there is no {CONFIG} in that folder; {_instead(folder)}")
        return folder
    if is_hub_id(name.partition("@")[0]):
        return download_adapter(name)
    raise KestrelError(f"model.adapter {name}: there is no such folder, and it is no id on the Hub such as owner/name")


def find_cached(name: str) -> Path | None:
    """As `find_folder`, of what is on this machine already; None where it is not."""
    if Path(name).is_dir():
        return Path(name)
    return cached_adapter(name) if is_hub_id(name.partition("@")[0]) else None


def _instead(folder: Path) -> str:
    if (folder / "adapter" / CONFIG).is_file():
        return f"did you mean {folder / 'adapter'}?"
    if (folder / "model.safetensors").is_file() or list(folder.glob("model-*.safetensors")):
        return "it holds a whole model, which is used with model.name"
    return "name a run's adapter folder, or one that PEFT saved"


def is_ours(folder: Path) -> bool:
    """Whether train.py made it.

    Raises:
        KestrelError: it is a checkpoint of a training, or another artifact of ours.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    manifest = read_json(path, restore(folder))
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind == "checkpoint":
        raise KestrelError(f"{folder} is a checkpoint of a training; name the adapter that train.py made in the end")
    return kind is not None or (folder / PROMPT).exists()  # else another tool calls a file of its own so


def restore(folder: Path) -> str:
    """What to do about a damaged adapter from elsewhere."""
    if folder.parent.name == "snapshots":  # of the Hub's client, whose files are links to others
        return f"delete {folder.parent.parent}, and it is downloaded again"
    return "copy it anew from where it was made"


def described(folder: Path) -> dict[str, Any]:
    """A manifest of what is known of an adapter that has none: its configuration and the hashes of its files.

    Raises:
        KestrelError: damaged.
    """
    config = read_json(folder / CONFIG, restore(folder))
    if not isinstance(config, dict):
        raise KestrelError(f"{folder / CONFIG} is damaged (no configuration); {restore(folder)}")
    targets = config.get("target_modules")
    return {
        "kind": "adapter made elsewhere",
        "settings": {
            "lora": {
                "r": config.get("r"),
                "alpha": config.get("lora_alpha"),
                "dropout": config.get("lora_dropout"),
                "target_modules": sorted(targets) if isinstance(targets, list) else targets,
            }
        },
        "made_from": {"base": config.get("base_model_name_or_path")},
        "files": {name: sha256_of(folder / name) for name in (CONFIG, WEIGHTS)},
    }


def identity_of_folder(folder: Path) -> str | None:
    """What generations say they were made from where this adapter made them; None where there is no adapter.

    Raises:
        KestrelError: its manifest or configuration is damaged.
    """
    if is_ours(folder):
        return identity_of(read_manifest(folder, "adapter", restore(folder), check_files=False))
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return identity_of(described(folder))
    return None


def download_adapter(name: str) -> Path:
    """An adapter's files from the Hub, or from its client's cache where the Hub does not answer.

    Args:
        name: owner/name, or owner/name@revision.

    Returns:
        The folder; it holds those of `ADAPTER_FILES` that the repository has.

    Raises:
        KestrelError: not found, not allowed, not reached, or no adapter in safetensors there.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    repository, _, revision = name.partition("@")
    use_cache_without_network()
    with plain_hub_errors(f"model.adapter {name}, which is no folder here"), _telling_cache_full():
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        else:
            # One after the other: a snapshot's threads (huggingface_hub 2.4) would not let Ctrl-C through for a minute.
            there = {
                entry.rfilename for entry in HfApi().model_info(repository, revision=revision or None).siblings or []
            }
            _require_adapter(name, there)
            wanted = [file for file in ADAPTER_FILES if file in there]
            paths = [Path(hf_hub_download(repository, file, revision=revision or None)) for file in wanted]
            folder = paths[0].parent
            if any(path.parent != folder for path in paths):
                raise KestrelError(f"model.adapter {name} was changed in the meantime; run the same command again")
    _require_adapter(name, {path.name for path in folder.iterdir()})
    return folder


def _require_adapter(name: str, files: set[str]) -> None:
    for needed in (CONFIG, WEIGHTS):
        if needed not in files:
            raise KestrelError(
                f"model.adapter {name}: the repository has no {needed} at its top; only PEFT adapters in safetensors are "
                "read, no pickles and no subfolders"
            )


@contextmanager
def _telling_cache_full() -> Iterator[None]:
    from huggingface_hub import constants

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Not enough free disk space")
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise KestrelError(
            f"the disk is full that holds the Hub's cache, {constants.HF_HUB_CACHE}; free some space and run the same "
            "command again, or set HF_HOME to a folder elsewhere"
        ) from None


def cached_adapter(name: str) -> Path | None:
    """The files that `download_adapter` brought last, without asking the Hub; None where it never did."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None
