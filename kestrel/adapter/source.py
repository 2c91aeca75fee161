"""An adapter's folder: where it is, who made it, and its identity. Imports nothing heavy, so evaluate.py can use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kestrel.config.settings import is_hub_id
from kestrel.errors import KestrelError
from kestrel.hub import plain_full_cache, plain_hub_errors, refuse_pointers, use_cache_without_network
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, sha256_of

# All files of an adapter. Nothing else is downloaded, above all no pickles, and nothing else is published.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
CONFIG, WEIGHTS, PROMPT = "adapter_config.json", "adapter_model.safetensors", "prompt.json"
ADAPTER_FILES = (CONFIG, WEIGHTS, PROMPT, MANIFEST, *TOKENIZER_FILES)


def find_adapter(name: str) -> Path:
    """The folder of model.adapter, downloaded where it is an id on the Hub.

    Raises:
        KestrelError: no such folder, no adapter in it, or no such adapter on the Hub.
    """
    folder = Path(name)
    if folder.is_file():
        raise KestrelError(f"model.adapter {name} is a file; name its folder, or an id on the Hub")
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise KestrelError(f"model.adapter {name}: there is no {CONFIG} in that folder; {_suggestion(folder)}")
        refuse_pointers(folder, "model.adapter")
        return folder
    if is_hub_id(name.partition("@")[0]):
        return download_adapter(name)
    raise KestrelError(f"model.adapter {name}: no such folder, and not an id on the Hub such as owner/name")


def find_local_adapter(name: str) -> Path | None:
    """As `find_adapter`, without asking the Hub; None where the adapter is not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    if not is_hub_id(repository):
        return None
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def _suggestion(folder: Path) -> str:
    if found := sorted(folder.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime):  # a run's, or a checkpoint
        return f"did you mean {found[-1].parent}?"
    if (folder / "model.safetensors").is_file() or list(folder.glob("model-*.safetensors")):
        return "it holds a whole model, which belongs in model.name"
    return "name a run's adapter folder, or one that PEFT saved"


def is_made_by_kestrel(folder: Path) -> bool:
    """Whether train.py made it.

    Raises:
        KestrelError: it is a checkpoint, or another artifact of a run.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    manifest = read_json(path, repair_advice(folder))
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind == "checkpoint":
        raise KestrelError(f"{folder} is a checkpoint; name the adapter folder that train.py wrote at the end")
    return kind is not None or (folder / PROMPT).exists()  # else another tool's manifest.json


def repair_advice(folder: Path) -> str:
    """What to do about a damaged adapter that this run did not train."""
    if folder.parent.name == "snapshots":  # of the Hub's client, whose files are links to others
        return f"delete {folder.parent.parent} to download it again"
    return "copy it again from where it was made"


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        KestrelError: missing or damaged.
    """
    config = read_json(folder / CONFIG, repair_advice(folder))
    if not isinstance(config, dict):
        raise KestrelError(f"{folder / CONFIG} is damaged (no configuration); {repair_advice(folder)}")
    return config


def lora_of(config: dict[str, Any]) -> dict[str, Any]:
    """Our settings of LoRA from peft's."""
    targets = config.get("target_modules")
    return {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }


def foreign_manifest(folder: Path) -> dict[str, Any]:
    """A manifest for an adapter that has none: its configuration and the hashes of its files."""
    config = read_config(folder)
    return {
        "kind": "adapter made elsewhere",
        "settings": {"lora": lora_of(config)},
        "made_from": {"base": config.get("base_model_name_or_path")},
        "files": {name: sha256_of(folder / name) for name in (CONFIG, WEIGHTS)},
    }


def adapter_identity(folder: Path) -> str | None:
    """What generations record as the adapter that they were made from; None where there is no adapter.

    Raises:
        KestrelError: its manifest or configuration is damaged.
    """
    if is_made_by_kestrel(folder):
        return identity_of(read_manifest(folder, "adapter", repair_advice(folder), check_files=False))
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return identity_of(foreign_manifest(folder))
    return None


def download_adapter(name: str) -> Path:
    """An adapter's files from the Hub, or from its client's cache where the Hub does not answer.

    Args:
        name: owner/name, or owner/name@revision.

    Raises:
        KestrelError: not found, no access, no connection, or no adapter in safetensors.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    repository, _, revision = name.partition("@")
    use_cache_without_network()
    with plain_hub_errors(f"model.adapter {name}, which is no folder here"), plain_full_cache():
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        else:
            # One by one: the threads of snapshot_download (huggingface_hub 2.4) block Ctrl-C for a minute.
            siblings = HfApi().model_info(repository, revision=revision or None).siblings or []
            found = {entry.rfilename for entry in siblings}
            require_files(f"model.adapter {name}: the repository", found)
            files = [file for file in ADAPTER_FILES if file in found]
            paths = [Path(hf_hub_download(repository, file, revision=revision or None)) for file in files]
            folder = paths[0].parent
            if any(path.parent != folder for path in paths):
                raise KestrelError(f"model.adapter {name} changed during the download; run the same command again")
    require_files(f"model.adapter {name}: the repository", {path.name for path in folder.iterdir()})
    return folder


def require_files(where: str, files: set[str]) -> None:
    """Raises a KestrelError if an adapter's folder or repository lacks its configuration, or weights in safetensors."""
    for needed in (CONFIG, WEIGHTS):
        if needed not in files:
            raise KestrelError(
                f"{where} has no {needed} at its top; only PEFT adapters in safetensors are read, no pickles and no "
                "subfolders; load another one with peft, and save it again with save_pretrained"
            )
