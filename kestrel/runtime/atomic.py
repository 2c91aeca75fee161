"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kestrel.errors import KestrelError

LEFT_BY_A_KILL = ".incomplete-"  # in the name of what is not finished yet; `clear_leftovers` removes it


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
