"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from kestrel.errors import KestrelError

INCOMPLETE = ".incomplete-"  # in the names of unfinished files and folders; `clear_leftovers` removes them
_FORMER = ".former-"  # in the names of folders about to be replaced
_unfinished: set[Path] = set()  # what this process is writing


def remove_unfinished() -> None:
    """Removes what this process has begun to write and will not finish."""
    for path in list(_unfinished):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, of which nothing is left when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{INCOMPLETE}{os.getpid()}")
    _remove(temporary)
    _unfinished.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


@contextmanager
def write_atomically(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file, open for UTF-8 text or with "wb" for bytes, that gets its name when the block ends without an error."""
    with _temporary(path) as temporary:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """An empty folder that gets the name `path` when the block ends without an error, in place of what was there.

    A process killed between the two renames leaves the old folder beside `path`; `clear_leftovers` restores it.

    Raises:
        KestrelError: `path` is a file, which is not deleted.
    """
    if path.exists() and not path.is_dir():
        raise KestrelError(f"{path} is a file where a folder is needed; move it away, or give this run another run_dir")
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        _fsync(temporary)
        former = path.with_name(f".{path.name}{_FORMER}{os.getpid()}")
        try:
            if os.path.lexists(path):  # also a link to a folder that is gone
                os.replace(path, former)
            os.replace(temporary, path)
        finally:
            if os.path.lexists(former) and not os.path.lexists(path):
                os.replace(former, path)
            if former.is_symlink():
                former.unlink()
            shutil.rmtree(former, ignore_errors=True)


def _fsync(folder: Path) -> None:
    """Writes a folder's content to the disk, so that a power cut after its rename does not leave empty files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        # Some file systems cannot synchronize folders.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
        os.close(descriptor)


def clear_leftovers(folder: Path) -> None:
    """Restores and removes what killed processes left in a folder that no other process is writing to."""
    _clear(folder.rglob(f".*{kind}*") for kind in (_FORMER, INCOMPLETE))


def clear_leftovers_of(path: Path) -> None:
    """The same for one file or folder, beside others that living processes of this machine may be writing."""
    name = f".{glob.escape(path.name)}"
    _clear(
        [left for left in path.parent.glob(f"{name}{kind}*") if not _is_alive(left.name.rpartition("-")[2])]
        for kind in (_FORMER, INCOMPLETE)
    )


def _is_alive(number: str) -> bool:
    """Whether the process of that number runs on this machine; True where it cannot be known."""
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


def _clear(leftovers: Iterable[Iterable[Path]]) -> None:
    formers, incomplete = map(sorted, leftovers)
    for former in formers:
        path = former.with_name(former.name[1:].rpartition(_FORMER)[0])
        if not os.path.lexists(path):
            os.replace(former, path)
    for left in [*formers, *incomplete]:
        _remove(left)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all. NaN and infinity are refused: JSON does not have them."""
    with write_atomically(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON file, in which another reader must not find another value; ValueError for a key given twice."""
    value: dict[str, Any] = {}
    for name, given in pairs:
        if name in value:
            raise ValueError(f"{name!r} is given twice")
        value[name] = given
    return value


def open_regular(path: Path) -> IO[bytes]:
    """A file to read; OSError for what is none. Reading a pipe could wait for ever, and a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def read_json(path: Path, remedy: str) -> Any:
    """Reads JSON that one of the scripts wrote; a KestrelError with the remedy if it is missing or damaged."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read().decode("utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError) as error:
        problem = f"is damaged ({error})"
    raise KestrelError(f"{path} {problem}; {remedy}")
