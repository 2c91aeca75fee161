"""The local files of a source (file, folder or hub id), by split."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from kestrel.config.settings import is_hub_id
from kestrel.data.lines import PACKED, SUFFIXES, is_data
from kestrel.data.raw import SourceFile
from kestrel.data.rows import SECTIONS, sections
from kestrel.dialogue import SPLITS
from kestrel.errors import KestrelError
from kestrel.hub import plain_full_cache, plain_hub_errors, use_cache_without_network

_SPLIT_WORDS = {"train": "train", "val": "validation", "valid": "validation", "dev": "validation", "test": "test"}
# A chat is often named after somebody, such as Valentina, Devin or Tester: of these words no part of a longer one is meant.
_BEGINNING = re.compile(r"train|(?:val|valid|dev|test)(?=(?:ing|ation|elopment|set|data)?(?![^\W\d_]))")

# Which files of a known hub set are the data, and in which revision: `datasets` (4.0 and later) does not run the loading
# script of personachat_truecased, but the Hub keeps a converted copy.
_HUB_FILES = {
    "bavard/personachat_truecased": ("refs/convert/parquet", ["full/*.parquet"]),
    "google/Synthetic-Persona-Chat": ("main", ["data/Synthetic-Persona-Chat_*.csv"]),
}


class Located(NamedTuple):
    """Files by split (in the order of SPLITS), the folder they are below, and their commit on the Hub."""

    files: dict[str, list[SourceFile]]
    root: Path
    hub_commit: dict[str, str]


def locate(source: str, revision: str | None) -> Located:
    """Finds the files of a source.

    One file is the train split, whatever its name, unless it is a JSON object with a list for each of several splits. In a
    folder, the split is in the files' names (train*; or valid, dev, test or such a word in the name or in that of a folder).

    Raises:
        KestrelError: the source does not exist, or several of its files could be one split.
    """
    path = Path(source).expanduser()
    if path.exists() and revision:
        raise KestrelError(f"{source} is a local path; data.revision ({revision}) is for data sets of the Hub only.")
    if path.is_dir():
        return Located(_files_of_folder(path, source), path, {})
    if path.exists() and not path.is_file():
        raise KestrelError(f"{source}: expected a file or a folder; this is a pipe or a device.")
    if path.exists():
        named = sections(path)
        by_split = {SECTIONS[section]: [SourceFile(path, section)] for section in named}
        if len(by_split) < len(named):
            raise KestrelError(f"{source}: two of its keys ({', '.join(named)}) are one split; join their lists.")
        if len(by_split) < 2:
            return Located({"train": next(iter(by_split.values()), [SourceFile(path)])}, path.parent, {})
        if "train" not in by_split:
            raise KestrelError(f"{source}: no train split: its keys are {', '.join(named)}; a list 'train' is needed.")
        return Located({split: by_split[split] for split in SPLITS if split in by_split}, path.parent, {})
    if path.suffix in (*SUFFIXES, *PACKED) or not is_hub_id(source) or path.parent.exists():
        raise KestrelError(f"{source}: no such file, folder or hub id (owner/name).{_suggestion(path)}")
    return _download(source, revision)


def _suggestion(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    names = {entry.name.lower(): entry for entry in folder.iterdir() if not entry.name.startswith(".")}
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.4)
    return f" Did you mean {names[close[0]]}?" if close else ""


def _files_of_folder(folder: Path, source: str) -> dict[str, list[SourceFile]]:
    paths = _data_files(folder)
    by_split: dict[str, list[SourceFile]] = {}
    for split in SPLITS:
        files = [path for path in paths if _split_of(path, folder) == split]
        if len({re.sub(r"\d+", "#", path.name) for path in files}) > 1:
            names = ", ".join(path.relative_to(folder).as_posix() for path in files[:6])
            raise KestrelError(
                f"{source}: several files could be the {split} split ({names}). "
                "Set data.source to one file, or to a folder that holds one form of the data."
            )
        if files:
            by_split[split] = [SourceFile(path) for path in files]
    if "train" in by_split:
        used = {file.path for files in by_split.values() for file in files}
        if left := [path.relative_to(folder).as_posix() for path in paths if path not in used]:
            print(
                f"{source}: files whose names name no split are left out ({len(left)}, such as {left[0]}), for "
                f"{by_split['train'][0].path.name} is taken as the train split; rename it if it is not",
                file=sys.stderr,
            )
        return by_split
    if paths and not by_split:  # a file for each dialogue, or for each chat
        return {"train": [SourceFile(path) for path in paths]}
    there = paths or sorted(folder.iterdir())
    found = ", ".join(path.relative_to(folder).as_posix() for path in there[:6]) or "no file"
    found += "".join(f"; {files[0].path.name} is taken as the {split} split" for split, files in by_split.items())
    raise KestrelError(
        f"{source}: no train split: a file whose name begins with 'train' ({'/'.join(SUFFIXES)}) is needed; found {found}. "
        "To cut all splits from one file, set data.source to that file."
    )


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if is_data(PurePosixPath(path.relative_to(folder).as_posix())) and path.is_file()
    )


def _split_of(path: Path, folder: Path) -> str | None:
    if word := _BEGINNING.match(path.stem.lower()):
        return _SPLIT_WORDS[word[0]]
    for name in (path.stem, *reversed(path.relative_to(folder).parent.parts)):
        words = set(re.split(r"[\W_]+", name.lower()))
        named = {SECTIONS.get(word) or _SPLIT_WORDS.get(word) for word in words} - {None}
        if len(named) == 1:
            return named.pop()
    return None


def _download(repo_id: str, revision: str | None) -> Located:
    """Downloads the files of a hub set into the Hub's cache, unless it has them, and treats them as a folder."""
    import huggingface_hub

    default, plain = _HUB_FILES.get(repo_id, ("main", [f"*{suffix}" for suffix in SUFFIXES]))
    revision = revision or default
    use_cache_without_network()
    what = f"data.source {repo_id} (revision {revision}), which is no file here"
    without_network = (
        f"; or fill the cache elsewhere with `hf download --repo-type dataset {repo_id} --revision {revision}` and set "
        "HF_HOME to it, or set data.source to a folder with the downloaded files"
    )
    packed = [f"*{suffix}{packing}" for suffix in SUFFIXES for packing in PACKED[:3]]
    for patterns in (plain, [*packed, "*.zip"]):  # the same data is often there in both forms
        with plain_hub_errors(what, without_network), plain_full_cache():
            snapshot = Path(
                huggingface_hub.snapshot_download(
                    repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns, max_workers=2
                )
            )
        if _data_files(snapshot):
            files = _files_of_folder(snapshot, f"{repo_id} (in {snapshot})")
            return Located(files, snapshot, {"hub id": repo_id, "hub revision": snapshot.name})
    raise KestrelError(
        f"{what}: none of its files has a name that ends in {', '.join(SUFFIXES)}, packed or not; another revision may, "
        "such as refs/convert/parquet"
    )
