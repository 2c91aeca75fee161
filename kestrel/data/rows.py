"""Rows of JSON lines, JSON, CSV and Parquet files, with their place in the file and checked access to columns."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from kestrel.data.lines import LONGEST_LINE, first_bytes, text_lines
from kestrel.errors import KestrelError

FileType = Literal["parquet", "json", "jsonl", "csv", "numbered"]
SECTIONS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation", "test": "test"}

_CHUNK = 2**20
_JSON_SECTIONS = re.compile(rb'\{\s*"(train|valid|validation|dev|test)"\s*:\s*\[')
_NUMBERED = re.compile(rb"\d+ \S")


@dataclass(frozen=True)
class Row:
    """One record: its place (`file:line`, or `file: row n`) and its columns."""

    where: str
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """A column of text; None (a null cell) is the empty text."""
        value = self.values.get(key, self)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise KestrelError(f"{self.where}: '{key}' must be a text, found {self._found(key)}.")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A column that is a list of texts."""
        value = self.values.get(key, self)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise KestrelError(f"{self.where}: '{key}' must be a list of texts, found {self._found(key)}.")
        return tuple(value)

    def objects(self, key: str) -> list[Row]:
        """A column that is a list of objects, each as a row of its own."""
        value = self.values.get(key, self)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise KestrelError(f"{self.where}: '{key}' must be a list of objects, found {self._found(key)}.")
        return [Row(f"{self.where}, {key}[{index}]", item) for index, item in enumerate(value)]

    def identifier(self, key: str) -> str:
        """A column that identifies something: a printable text or a whole number."""
        value = self.values.get(key, self)
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if not text.strip() or not text.isprintable():
            raise KestrelError(
                f"{self.where}: '{key}' must be a printable text or a whole number, found {self._found(key)}."
            )
        return text

    def _found(self, key: str) -> str:
        return repr(self.values[key])[:60] if key in self.values else f"only {sorted(self.values)}"


def file_type(path: Path) -> FileType:
    """The type of a file, by its first bytes.

    Raises:
        KestrelError: the file is empty, or plainly not data (see `lines.first_bytes`).
    """
    start = first_bytes(path)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"[") or _JSON_SECTIONS.match(start):
        return "json"
    if start.startswith(b"{"):
        return "jsonl"
    return "numbered" if _NUMBERED.match(start) else "csv"


def sections(path: Path) -> list[str]:
    """The keys of a JSON object of lists that name splits, in the file's order; empty for any other file."""
    if file_type(path) != "json":
        return []
    found = []
    for section, _, _ in _json_items(path):
        if section and section not in found:
            found.append(section)
    return found


def rows(path: Path, section: str | None = None) -> Iterator[Row]:
    """Streams the rows of a file in bounded memory.

    Args:
        path: a JSON, CSV or Parquet file.
        section: for a JSON object of lists, the key whose list is meant; None: all.
    Raises:
        KestrelError: malformed, with the place.
    """
    kind = file_type(path)
    if kind == "parquet":
        yield from _parquet(path)
    elif kind == "json":
        for key, where, item in _json_items(path):
            if section is None or key == section:
                yield Row(where, item)
    elif kind == "jsonl":
        yield from _json_lines(path)
    else:
        yield from _csv(path)


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in text_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise KestrelError(f"{where}: not JSON ({_reason(error)}); one object a line is expected.") from error
        if not isinstance(value, dict):
            raise KestrelError(f"{where}: one JSON object a line is expected, found {line.strip()[:60]!r}.")
        yield Row(where, value)


def _csv(path: Path) -> Iterator[Row]:
    # The default limit is 131,072 characters, which a long conversation in one cell exceeds.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    reader = csv.reader((line for _, line in text_lines(path)), strict=True)
    try:
        columns = next(reader)
        if len(set(columns)) != len(columns):
            raise KestrelError(f"{path}:1: a column name occurs twice in {columns}.")
        start = reader.line_num + 1
        for cells in reader:
            where = f"{path}:{start}"
            if cells and len(cells) != len(columns):
                raise KestrelError(f"{where}: {len(cells)} cells, but the header has {len(columns)} columns.")
            if cells:
                yield Row(where, dict(zip(columns, cells, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise KestrelError(f"{path}:{reader.line_num}: not CSV ({error}); is a quotation mark left open?") from error
    except StopIteration:
        raise KestrelError(f"{path}: the file has no header line.") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield Row(f"{path}: row {number}", values)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise KestrelError(f"{path}: not readable as Parquet after row {number}: {error}") from error


def _json_items(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(section or "", place, object) of `[{...}, ...]` or `{"train": [{...}, ...], ...}`, one object in memory."""
    with path.open("rb") as file:
        json_text = _JsonText(path, file)
        if json_text.peek() == "[":
            yield from _json_array(json_text, "")
        else:
            json_text.take("{")
            seen: set[str] = set()
            while True:
                key = json_text.value('"')
                if key not in SECTIONS or key in seen:
                    raise KestrelError(
                        f"{json_text.place()}: the key {key!r} is not one of {list(SECTIONS)}, each once."
                    )
                seen.add(key)
                json_text.take(":")
                yield from _json_array(json_text, key)
                if json_text.take(",}") == "}":
                    break
        json_text.end()


def _json_array(json_text: _JsonText, section: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    json_text.take("[")
    if json_text.peek() == "]":
        json_text.take("]")
        return
    index = 0
    while True:
        yield section, f"{json_text.path}: {section}[{index}]", json_text.value("{")
        index += 1
        if json_text.take(",]") == "]":
            return


class _JsonText:
    """A JSON text read in chunks; the standard library decodes the values."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._line = 1
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more(_CHUNK):
                return ""

    def take(self, expected: str) -> str:
        """Consumes the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            what = f"{found!r}" if found else "the end of the file (is it cut off?)"
            raise KestrelError(f"{self.place()}: expected one of {' '.join(expected)}, found {what}.")
        self._at += 1
        return found

    def value(self, first: str) -> Any:
        """Consumes a value that begins with `first`."""
        if self.peek() != first:
            self.take(first)
        size = _CHUNK
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                # A value that the chunk cuts off fails at the end of the chunk, or inside a string without an end.
                cut_off = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if len(self._text) - self._at > LONGEST_LINE or not (cut_off and self._more(size)):
                    raise KestrelError(f"{self.place(error.pos)}: not JSON ({error.msg}).") from error
                size *= 2
            except (ValueError, RecursionError) as error:
                raise KestrelError(f"{self.place()}: not JSON ({_reason(error)}).") from error

    def end(self) -> None:
        """Raises an error if anything follows."""
        if self.peek():
            raise KestrelError(f"{self.place()}: more text after the end of the JSON value.")

    def place(self, at: int | None = None) -> str:
        return f"{self.path}:{self._line + self._text.count(chr(10), 0, self._at if at is None else at)}"

    def _more(self, size: int) -> bool:
        raw = self._file.read(size)
        self._line += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :]
        self._at = 0
        try:
            self._text += self._utf8.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            byte = self._file.tell() - len(error.object) + error.start + 1
            raise KestrelError(
                f"{self.path}:{line}: byte {byte} of the file (0x{error.object[error.start]:02x}) is not UTF-8. "
                "Convert the file to UTF-8."
            ) from error
        return bool(raw)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
