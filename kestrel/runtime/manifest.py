"""Manifests: what an artifact on disk is, how and from what it was made, and the hash of each of its files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.distributed import is_first

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"
_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers",
    "evaluate", "sacrebleu", "rouge_score",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that shape results, read without importing them."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@functools.cache
def git_commit() -> str | None:
    """Commit of this checkout at the first call, with `+changes` if the working tree differs; None outside of git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex digest of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def files_below(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder except its manifest and hidden files, which browsers and editors leave, by path."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / MANIFEST
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def write_manifest(folder: Path, kind: str, settings: dict[str, Any], made_from: dict[str, Any], **facts: Any) -> None:
    """Writes a finished folder's manifest; `facts` are further entries."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "settings": settings,
        "made_from": made_from,
        **facts,
        "versions": library_versions(),
        "git_commit": git_commit(),
        "files": files_below(folder),
    }
    write_json(folder / MANIFEST, with_own_hash(manifest))


def with_own_hash(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, or metrics.json, with the hash of its other entries."""
    rest = {key: value for key, value in manifest.items() if key != _OWN_HASH}
    return {**rest, _OWN_HASH: sha256_of_json(rest)}


def read_manifest(folder: Path, kind: str, remedy: str, check_files: bool = True) -> dict[str, Any]:
    """Reads a manifest and checks that its folder is what it describes.

    Raises:
        KestrelError: absent, damaged, of another kind or schema, or (if `check_files`) a file is missing or changed;
            with the remedy.
    """
    manifest = read_json(folder / MANIFEST, remedy)
    if problem := next(_problems(folder, kind, manifest, check_files), None):
        raise KestrelError(f"{problem}; {remedy}")
    return manifest


def _problems(folder: Path, kind: str, manifest: Any, check_files: bool) -> Iterator[str]:
    """What is wrong with an artifact. After the first problem, the others may be its consequences."""
    path = folder / MANIFEST
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        yield f"{path} does not describe a {kind}"
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        yield f"{path} has schema version {version}, this version of Kestrel reads {SCHEMA_VERSION}"
    if manifest != with_own_hash(manifest) and _OWN_HASH in manifest:
        yield f"{path} is damaged or was edited: its own sha256 does not match"
    for part in ("settings", "made_from", "files"):
        if not isinstance(manifest.get(part), dict):
            yield f"{path} is damaged (no {part})"
    for name, digest in manifest["files"].items() if check_files else ():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"{path} is damaged (it names {name!r}, which is outside of {folder})"
        if not os.path.isfile(folder / name):  # Path.is_file raises if the name is too long
            yield f"{folder / name} is missing"
        if sha256_of(folder / name) != digest:
            yield f"{folder / name} is damaged or was edited: its sha256 is not the one in {MANIFEST}"


def require_artifact(folder: Path, kind: str, remedy: str) -> None:
    """Checks, before anything heavy is imported, that an artifact of an earlier script exists.

    Only in the first process: if another does not see it, `rendezvous.join_processes` reports another run folder there.
    """
    if is_first() and not folder.is_dir():
        raise KestrelError(f"there is no {kind} in {folder}; {remedy}")


def identity_of(manifest: dict[str, Any]) -> str:
    """sha256 of what an artifact is, without when and by which commit it was made."""
    return sha256_of_json({key: manifest.get(key) for key in ("kind", "settings", "made_from", "prompt", "files")})


def differences(recorded: Any, expected: Any, words: str = "it was {}, now {}", prefix: str = "") -> Iterator[str]:
    """`key: it was X, now Y`, or as `words` puts it, for every leaf in which two nested dicts differ."""
    if isinstance(recorded, dict) and isinstance(expected, dict):
        for key in sorted({*recorded, *expected}):
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from differences(recorded.get(key), expected.get(key), words, name)
    elif recorded != expected:
        yield f"{prefix}: {words.format(_short(recorded), _short(expected))}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}… ({len(text):,} characters)"


def require_equal(what: str, recorded: dict[str, Any], expected: dict[str, Any], remedy: str) -> None:
    """Refuses, with a KestrelError that names each difference, an artifact made with other settings than this run's."""
    if lines := list(differences(recorded, expected)):
        raise KestrelError("\n  ".join([f"{what} was made with other settings; {remedy}", *lines]))
