"""From a source (file, folder or hub id) to local files, by split."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from kestrel.data.rows import SECTIONS, sections
from kestrel.errors import KestrelError
from kestrel.hub import use_cache_without_network

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPLIT_WORDS = {"train": "train", "val": "validation", "valid": "validation", "dev": "validation", "test": "test"}
_NOT_DATA = re.compile(r"(readme|license|requirements|dataset_infos?|state)\b", re.IGNORECASE)

# Which files of a known hub set are the data, and on which revision: the loading script of personachat_truecased is no
# longer run by `datasets` (4.0 and later), but the Hub keeps a converted copy.
_HUB_FILES = {
    "AlekseyKorshuk/persona-chat": (None, ["data/*.parquet"]),
    "Cynaptics/persona-chat": (None, ["data/*.parquet"]),
    "bavard/personachat_truecased": ("refs/convert/parquet", ["full/*.parquet"]),
    "google/Synthetic-Persona-Chat": (None, ["data/Synthetic-Persona-Chat_*.csv"]),
}


@dataclass(frozen=True)
class Part:
    """A file, or the section of a JSON file, that belongs to a split."""

    path: Path
    section: str | None = None


@dataclass(frozen=True)
class Located:
    """What was found: parts by split (in the order train, validation, test) and where the files came from."""

    parts: dict[str, list[Part]]
    root: Path
    origin: dict[str, str]

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(part.path for parts in self.parts.values() for part in parts))

    def fingerprint(self) -> dict[str, str]:
        """File name below the source -> sha256; for the hub also the id and the commit."""
        return self.origin | {path.relative_to(self.root).as_posix(): _sha256(path) for path in self.files}


def locate(source: str, revision: str | None) -> Located:
    """Finds the files of a source.

    One file is the train split, whatever its name, unless it is a JSON object with a list for each split. In a folder,
    the files' names (train*, valid*, dev*, test*; or such a word in the name, or the name of the folder that holds it)
    tell the split.

    Raises:
        KestrelError: nothing there, or more than one thing that could be meant.
    """
    path = Path(source).expanduser()
    if path.exists() and revision:
        raise KestrelError(f"{source} is on this machine; a revision ({revision}) is for data sets of the Hub only.")
    if path.is_dir():
        return Located(_folder(path, source), path, {})
    if path.exists():
        named = {SECTIONS[section]: [Part(path, section)] for section in sections(path)}
        return Located(
            {split: named[split] for split in SPLITS if split in named} or {"train": [Part(path)]}, path.parent, {}
        )
    local = path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source) or path.parent.exists()
    if local:
        raise KestrelError(f"{source}: no such file, folder or hub id (owner/name).{_nearest(path)}")
    return _hub(source, revision)


def _nearest(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    names = {entry.name.lower(): entry for entry in folder.iterdir() if not entry.name.startswith(".")}
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.4)
    return f" The nearest name there is {names[close[0]]}." if close else ""


def _folder(folder: Path, source: str) -> dict[str, list[Part]]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and path.is_file()
        and not _NOT_DATA.match(path.name)
        and not any(piece.startswith(".") for piece in path.relative_to(folder).parts)
    )
    by_split: dict[str, list[Part]] = {}
    for split in SPLITS:
        files = [path for path in found if _split_of(path, folder) == split]
        if len({re.sub(r"\d+", "#", path.name) for path in files}) > 1:
            names = ", ".join(path.relative_to(folder).as_posix() for path in files[:6])
            raise KestrelError(
                f"{source}: several files could be the {split} split ({names}). "
                "Give one file, or a folder that holds one form of the data."
            )
        if files:
            by_split[split] = [Part(path) for path in files]
    if "train" in by_split:
        return by_split
    seen = ", ".join(path.relative_to(folder).as_posix() for path in found[:6]) or "no data file"
    raise KestrelError(
        f"{source}: no train split: a file whose name begins with 'train' ({'/'.join(SUFFIXES)}) is needed; found {seen}. "
        "To cut all splits from one file, give that file."
    )


def _split_of(path: Path, folder: Path) -> str | None:
    for word, split in _SPLIT_WORDS.items():
        if path.stem.lower().startswith(word):
            return split
    for name in (path.stem, *reversed(path.relative_to(folder).parent.parts)):
        words = set(re.split(r"[\W_]+", name.lower()))
        named = {SECTIONS.get(word) or _SPLIT_WORDS.get(word) for word in words} - {None}
        if len(named) == 1:
            return named.pop()
    return None


def _hub(repo_id: str, revision: str | None) -> Located:
    """Downloads the files of a hub set into the Hub's cache, or finds them there, and treats them as a folder."""
    import huggingface_hub

    default, patterns = _HUB_FILES.get(repo_id, (None, [f"*{suffix}" for suffix in SUFFIXES]))
    revision = revision or default or "main"
    if revision != default and repo_id == "bavard/personachat_truecased":
        patterns = ["*.parquet"]
    use_cache_without_network()
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns, max_workers=2
            )
        )
    # The Hub's client raises many kinds (its own, httpx's, OSError): all of them mean that the data is not here.
    except Exception as error:
        raise KestrelError(
            f"{repo_id} (revision {revision}) is not a file here, is not in the Hub's cache and could not be downloaded "
            f"({type(error).__name__}). Connect to the network (and unset HF_HUB_OFFLINE), fill the cache elsewhere "
            f"with `hf download --repo-type dataset {repo_id} --revision {revision}` and set HF_HOME to it, or set "
            "data.source to a folder with the downloaded files."
        ) from error
    origin = {"hub id": repo_id, "hub revision": snapshot.name}
    parts = _folder(snapshot, f"{repo_id} (in {snapshot})")
    return Located(parts, snapshot, origin)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
