"""Text files read strictly: UTF-8 or an error that names file, line and byte."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from kestrel.errors import KestrelError

LONGEST_LINE = 64 * 2**20  # bytes; a line is held in memory whole
_HEAD = 4096
_BLOCK = 2**20

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
        KestrelError: the file cannot be read, is empty, or is clearly something else (an archive, a web page, a Git LFS
            pointer, UTF-16).
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
    for block in _blocks(path):
        try:
            # Lines end at line feeds only, as bytes are split; str.splitlines would find more line ends.
            lines: Iterator[str] = io.StringIO(block.decode("utf-8"), newline="\n")
        except UnicodeDecodeError:
            first = number + 1
            lines = (_decode(raw, path, first + index) for index, raw in enumerate(io.BytesIO(block)))
        for line in lines:
            number += 1
            if number == 1:
                line = line.removeprefix("\ufeff")
            yield number, line


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks of whole lines: reading and decoding line by line takes three times as long."""
    lines, rest = 0, b""
    try:
        with path.open("rb") as file:
            while piece := file.read(_BLOCK):
                end = piece.rfind(b"\n") + 1
                first = len(rest) + (piece.find(b"\n") + 1 or len(piece))
                if first > LONGEST_LINE:
                    raise KestrelError(f"{path}:{lines + 1}: a line of more than {LONGEST_LINE:,} bytes; is it data?")
                if end:
                    yield rest + piece[:end]
                    lines += piece.count(b"\n")
                    rest = b""
                rest += piece[end:]
    except OSError as error:
        raise KestrelError(f"{path}: cannot be read: {error.strerror}.") from error
    if rest:
        yield rest


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KestrelError(
            f"{path}:{line}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8. "
            "Convert the file to UTF-8."
        ) from error
