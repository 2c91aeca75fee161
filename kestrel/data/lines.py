"""Text files read strictly: UTF-8 or an error that names file, line and byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kestrel.errors import KestrelError

LONGEST_LINE = 64 * 2**20  # bytes; a line is held in memory whole
_HEAD = 4096

_NOT_TEXT = {
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the data: fetch the file itself (git lfs pull)",
}


def first_bytes(path: Path) -> bytes:
    """The first bytes of a data file, without byte order mark and leading white space.

    Raises:
        KestrelError: the file cannot be read, is empty, or is clearly something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_HEAD)
            while start and len(start.strip()) == 0:
                start = file.read(_HEAD)
    except OSError as error:
        raise KestrelError(f"{path}: cannot be read: {error.strerror}.") from error
    for magic, meaning in _NOT_TEXT.items():
        if start.startswith(magic):
            raise KestrelError(f"{path}: this is {meaning}.")
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise KestrelError(f"{path}: the file is empty.")
    if start[:200].lower().startswith((b"<!doctype html", b"<html")):
        raise KestrelError(f"{path}: this is a web page, not the data: download the file itself.")
    return start


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Streams (line number from 1, line with its line end). A byte order mark is left out.

    Raises:
        KestrelError: not UTF-8, or a line of more than `LONGEST_LINE` bytes.
    """
    number = 0
    try:
        with path.open("rb") as file:
            # Lines end at line feeds only; str.splitlines would find more line ends.
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(raw) > LONGEST_LINE:
                    raise KestrelError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; is it data?")
                line = raw.decode("utf-8")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise KestrelError(
            f"{path}:{number}: byte {error.start + 1} of the line (0x{error.object[error.start]:02x}) is not UTF-8. "
            "Convert the file to UTF-8."
        ) from error
    except OSError as error:
        raise KestrelError(f"{path}: cannot be read: {error.strerror}.") from error
