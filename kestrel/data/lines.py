"""Data files as strict UTF-8, whatever they are packed in: errors name file, line and byte."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import shlex
import tempfile
import zipfile  # noqa: TID251  one member is read as a stream, nothing is extracted
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from kestrel.errors import KestrelError

LONGEST_LINE = 64 * 2**20  # bytes; a line is held in memory whole
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zip")
_HEAD = 4096
_CHUNK = 2**20

_NOT_DATA = {
    b"version https://git-lfs": "a Git LFS pointer, not the data: fetch the file itself (git lfs pull)",
    b"%PDF": "a PDF; save the dialogues as text or JSON",
    b"SQLite format 3": "a database; export its dialogues as text or JSON",
    b"ARROW1": "an Arrow file; write Parquet or JSON lines of it (datasets: to_parquet, to_json)",
    b"\xff\xff\xff\xff": "an Arrow file; write Parquet or JSON lines of it (datasets: to_parquet, to_json)",
}


@contextmanager
def open_utf8(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked (gzip, bzip2, xz, a zip archive of one data file), UTF-16 turned into UTF-8.

    Raises:
        KestrelError: the file cannot be read or unpacked, before or inside the block.
    """
    try:
        with ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
            start = _start_of(file)
            for magic, unpack in _UNPACK.items():
                if start.startswith(magic):
                    file = stack.enter_context(unpack(file))
                    start = _start_of(file)
            if encoding := _utf16(start):
                file = stack.enter_context(_as_utf8(file, encoding))
            yield file
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        NotImplementedError,  # zipfile: a way of packing that Python does not read
        UnicodeError,
    ) as error:
        raise KestrelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _start_of(file: IO[bytes]) -> bytes:
    start = file.read(_HEAD)
    file.seek(0)
    return start


def _utf16(start: bytes) -> str:
    """UTF-16's variant, by its mark or by the zeros of plain letters; "" for anything else."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not start.startswith(b"\xff\xff"):
        return "utf-32" if start.startswith(codecs.BOM_UTF32_LE) else "utf-16"
    letters = start[:32]
    if len(letters) >= 4 and not any(letters[1::2]) and all(letters[::2]):
        return "utf-16-le"
    return "utf-16-be" if len(letters) >= 4 and not any(letters[::2]) and all(letters[1::2]) else ""


def _as_utf8(file: IO[bytes], encoding: str) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    decoder = codecs.getincrementaldecoder(encoding)()
    while chunk := file.read(_CHUNK):
        copy.write(decoder.decode(chunk).encode())
    copy.write(decoder.decode(b"", final=True).encode())
    copy.seek(0)
    return copy


def _only_member(file: IO[bytes]) -> IO[bytes]:
    """The one data file of a zip archive; a messenger's export has pictures beside it."""
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if is_data(PurePosixPath(name))]
    if len(names) == 1:
        if archive.getinfo(names[0]).flag_bits & 1:
            raise zipfile.BadZipFile("the archive has a password; unpack it and set data.source to the file")
        return archive.open(names[0])
    if "xl/workbook.xml" in archive.namelist():
        raise zipfile.BadZipFile("this is a spreadsheet; save its sheet as CSV in UTF-8")
    found = ", ".join(names[:6] or archive.namelist()[:6]) or "nothing"
    raise zipfile.BadZipFile(
        f"an archive with one data file ({', '.join(SUFFIXES)}) is expected, found {found}; unpack it and set "
        "data.source to a file or folder"
    )


_UNPACK: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"PK\x03\x04": _only_member,
}


def is_data(path: PurePosixPath) -> bool:
    """Whether a file's name says that it may hold dialogues: no licence, no hidden file, no picture."""
    about = ("readme", "license", "requirements", "dataset_info", "state.json", "interlocutors.")
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    suffix = path.with_suffix("").suffix if path.suffix in PACKED[:3] else path.suffix
    return suffix in (*SUFFIXES, ".zip") and not hidden and not path.name.lower().startswith(about)


def first_bytes(path: Path) -> bytes:
    """The first bytes of a data file, without byte order mark and leading white space.

    Raises:
        KestrelError: the file cannot be read, is empty, or is clearly something else.
    """
    with open_utf8(path) as file:
        start = file.read(_HEAD)
        while start and not start.strip():
            start = file.read(_HEAD)
    for magic, meaning in _NOT_DATA.items():
        if start.startswith(magic):
            raise KestrelError(f"{path}: this is {meaning}.")
    if start[257:262] == b"ustar":
        raise KestrelError(f"{path}: this is a tar archive: unpack it first.")
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if not start:
        raise KestrelError(f"{path}: the file is empty.")
    if re.match(rb"<(!doctype|html|head|body|meta|\?xml)\b", start, re.IGNORECASE):
        raise KestrelError(
            f"{path}: this is a web page, not the data: download the file itself (on the Hub and on GitHub the raw "
            "file; of a messenger the export as JSON or text)."
        )
    return start


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Streams (line number from 1, line with its line end). A byte order mark is left out.

    Raises:
        KestrelError: not UTF-8, or a line of more than `LONGEST_LINE` bytes.
    """
    number = 0
    with open_utf8(path) as file:
        # Lines end at line feeds only; str.splitlines would find more line ends.
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise KestrelError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} bytes; is it data?")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}:{number}: byte {error.start + 1} of the line", error, path) from error
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def lines_without_ends(path: Path) -> Iterator[tuple[int, str]]:
    """As `text_lines`, for formats in which a line is a record: a carriage return inside one hides others."""
    for number, line in text_lines(path):
        line = line.rstrip("\r\n")
        if "\r" in line:
            raise KestrelError(f"{path}:{number}: a carriage return inside the line; convert the line ends.")
        yield number, line


def not_utf8(place: str, error: UnicodeDecodeError, path: Path) -> KestrelError:
    """Says which byte is at fault, and how the text reads in the encoding that it most often has."""
    near = error.object[max(0, error.start - 10) : error.start + 10]
    what = f"{place} (0x{error.object[error.start]:02x}) is not UTF-8"
    if re.search(rb"[\0-\x08]", near):
        return KestrelError(f"{what}; is it a file of text?")
    convert, name, suffix = "convert it", shlex.quote(str(path)), path.suffix
    if suffix in PACKED:  # iconv would convert the packed bytes
        convert, name, suffix = "unpack and convert it", "UNPACKED", Path(path.stem).suffix
    return KestrelError(
        f"{what}. If {near.decode('cp1252', 'replace')!r} reads right, the file is in Windows-1252 (otherwise name its "
        f"encoding here); {convert}: iconv -f WINDOWS-1252 -t UTF-8 {name} > converted{suffix}"
    )
