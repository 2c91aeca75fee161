"""What stands on disk and why it can be trusted: whole-or-nothing writes, manifests, hashes, one run a folder."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from kestrel.errors import KestrelError
from kestrel.lock import LOCK, locked
from kestrel.processes import is_first

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LEFT_BY_A_KILL = ".incomplete-"  # in the name of what is not finished yet; `clear_leftovers` removes it
_SEAL = "manifest_sha256"
_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers",
    "evaluate", "sacrebleu", "rouge_score",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that shape results, read without importing them."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def git_commit() -> str | None:
    """Commit of this checkout when it was first asked for, with `+changes` where the working tree differs; None outside
    of git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex digest of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_below(folder: Path) -> None:
    """Puts a folder's content on the disk, so that a power cut after its rename does not leave empty files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # which not every file system can
                raise
        finally:
            os.close(descriptor)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{os.getpid()}")


@contextmanager
def write_atomically(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """An open file that appears under `path` when the block ends without an error, and not before.

    Args:
        path: of the file; its folder is made.
        mode: "w" for UTF-8 text, "wb" for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, "incomplete")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            _flush(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """An empty folder that becomes `path` when the block ends without an error; what stood there is replaced.

    A process killed at any moment leaves the old folder or the new one: under `path`, or, between the two renames,
    beside it, from where `run_folder` puts it back.

    Raises:
        KestrelError: a file stands there, which nobody may have meant to lose.
    """
    if path.exists() and not path.is_dir():
        raise KestrelError(f"{path} is a file where a folder is to be made; move it away, or give another run_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = _beside(path, "incomplete"), _beside(path, "former")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush_below(temporary)
        if path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
    finally:
        if former.exists() and not path.exists():
            os.replace(former, path)
        shutil.rmtree(former, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Mends what killed processes left in a folder that no other process is writing to."""
    _mend(sorted(folder.rglob(".*.former-*")), folder.rglob(f".*{LEFT_BY_A_KILL}*"))


def clear_beside(path: Path) -> None:
    """Mends what killed processes of this machine left of one artifact, in a folder that others may be writing to."""
    beside = {what: path.parent.glob(f".{glob.escape(path.name)}.{what}-*") for what in ("former", "incomplete")}
    dead = {what: [left for left in found if not _is_alive(left.name)] for what, found in beside.items()}
    _mend(dead["former"], dead["incomplete"])


def _is_alive(leftover: str) -> bool:
    """Whether the process that `_beside` named a file after still runs, here or, who knows, elsewhere."""
    number = leftover.rpartition("-")[2]
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True


def _mend(formers: Iterable[Path], incomplete: Iterable[Path]) -> None:
    formers = list(formers)
    for former in formers:
        path = former.with_name(former.name[1:].rpartition(".former-")[0])
        if not path.exists():
            os.replace(former, path)
    for left in [*formers, *incomplete]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all. NaN and infinity are refused: they are no JSON."""
    with write_atomically(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path, remedy: str) -> Any:
    """Reads JSON that a script of ours wrote.

    Raises:
        KestrelError: missing or damaged; `remedy` says what to do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KestrelError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise KestrelError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise KestrelError(f"{path} is damaged ({error}); {remedy}") from None


def files_below(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder but its manifest, by relative path.

    Hidden files are none of ours: a file browser or an editor leaves them and takes them away.
    """
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / MANIFEST
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def write_manifest(folder: Path, kind: str, settings: dict[str, Any], made_from: dict[str, Any], **facts: Any) -> None:
    """Describes a finished folder: what it is, how it was made, of what, and the hash of each of its files."""
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
    write_json(folder / MANIFEST, sealed(manifest))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the hash of all else that it says."""
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    return {**rest, _SEAL: sha256_of_json(rest)}


def read_manifest(folder: Path, kind: str, remedy: str, check_files: bool = True) -> dict[str, Any]:
    """Reads a manifest and checks that the folder still is what it describes.

    Args:
        folder: an artifact of a run.
        kind: what it must be.
        remedy: the command that makes it, for the message.
        check_files: compare each file's hash.

    Raises:
        KestrelError: absent, damaged, of another kind or schema, or a file is missing or changed.
    """
    manifest = read_json(folder / MANIFEST, remedy)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise KestrelError(f"{folder / MANIFEST} does not describe a {kind}; {remedy}")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise KestrelError(
            f"{folder / MANIFEST} has schema version {manifest.get('schema_version')}, this is {SCHEMA_VERSION}; {remedy}"
        )
    if manifest != sealed(manifest) and _SEAL in manifest:
        raise KestrelError(f"{folder / MANIFEST} is damaged or was edited: its own sha256 does not fit; {remedy}")
    for part in ("settings", "made_from", "files"):
        if not isinstance(manifest.get(part), dict):
            raise KestrelError(f"{folder / MANIFEST} is damaged (no {part}); {remedy}")
    for name, digest in manifest["files"].items() if check_files else ():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise KestrelError(f"{folder / MANIFEST} is damaged (it names {name!r}, outside of {folder}); {remedy}")
        if not os.path.isfile(path):  # Path.is_file raises where the name is too long to be one
            raise KestrelError(f"{path} is missing; {remedy}")
        if sha256_of(path) != digest:
            raise KestrelError(f"{path} is damaged or was edited: its sha256 is not the one in {MANIFEST}; {remedy}")
    return manifest


def require_made(folder: Path, kind: str, remedy: str) -> None:
    """Refuses what an earlier script has not made, before anything heavy is imported to read it.

    Raises:
        KestrelError: there is no such folder. Only of several processes' first: that another sees none may have another
            reason, which `rendezvous.join` finds.
    """
    if is_first() and not folder.is_dir():
        raise KestrelError(f"there is no {kind} in {folder}; {remedy}")


def identity_of(manifest: dict[str, Any]) -> str:
    """sha256 of what an artifact is, whenever and by which commit it was made."""
    return sha256_of_json({key: manifest.get(key) for key in ("kind", "settings", "made_from", "prompt", "files")})


def differences(recorded: Any, expected: Any, words: str = "it was {}, now {}", prefix: str = "") -> Iterable[str]:
    """`key: it was X, now Y`, or in other words, for every leaf in which two nested dicts differ."""
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
    """Refuses an artifact whose recorded settings are not the ones of this run.

    Raises:
        KestrelError: naming each field that differs.
    """
    found = list(differences(recorded, expected))
    if found:
        raise KestrelError(f"{what} was made with other settings; {remedy}\n  " + "\n  ".join(found))


@contextmanager
def run_folder(run_dir: str, settings: str) -> Iterator[Path]:
    """The run's folder, locked for this process; when it is left, the resolved settings stand in config.yaml.

    Of several processes of one run, the first holds the lock for all and makes the folder.

    Raises:
        KestrelError: another process holds the folder, or there cannot be one.
    """
    folder = Path(run_dir)
    if not is_first():
        yield folder
        return
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise KestrelError(f"run_dir {folder} is or lies below a file; give this run another run_dir") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOENT):
            said = f"run_dir {str(folder)[:200]} cannot be made ({error.strerror}); give this run another run_dir"
            raise KestrelError(said) from None
        raise
    with locked(folder):
        clear_leftovers(folder)
        accepted = False
        try:
            yield folder
            accepted = True
        except KeyboardInterrupt:
            accepted = True
            raise
        finally:
            # Settings that were refused are not what the folder was made with.
            if accepted:
                with write_atomically(folder / "config.yaml") as file:
                    file.write(settings)
            elif is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
