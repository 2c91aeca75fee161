"""Rows of JSON lines, JSON, CSV and Parquet files, with their place in the file and checked access to columns."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from kestrel.data.lines import LONGEST_LINE, first_bytes, not_utf8, open_utf8, text_lines
from kestrel.errors import KestrelError

FileType = Literal["parquet", "json", "text"]
SECTIONS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation", "test": "test"}

_CHUNK = 2**20
_LONGEST_VALUE = 2**28  # characters; a messenger writes a whole chat as one value
_JSON_SECTIONS = re.compile(rb'\{\s*"(train|valid|validation|dev|test)"\s*:\s*\[')
_NOT_BLANK = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True)
class Row:
    """One record: its place (`file:line`, or `file: row n`) and its columns."""

    where: str
    values: dict[str, Any]

    def text(self, key: str, default: str | None = None) -> str:
        """A column of text; None (a null cell) is the empty text. Without a default it must exist."""
        value = self.values.get(key, default if default is not None else self)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.unexpected(key, "a text")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e15 < value < 1e15:
            raise self.unexpected(key, "a number")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.unexpected(key, "a list")
        return value

    def object(self, key: str) -> Row:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.unexpected(key, "an object")
        return Row(f"{self.where}, {key}", value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A column that is a list of texts."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.unexpected(key, "a list of texts")
        return tuple(value)

    def objects(self, key: str) -> list[Row]:
        """A column that is a list of objects, each as a row of its own; tables hold such a list as JSON in a text."""
        value = self.values.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                pass
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.unexpected(key, "a list of objects")
        return [Row(f"{self.where}, {key}[{index}]", item) for index, item in enumerate(value)]

    def identifier(self, key: str) -> str:
        """A column that identifies something: a printable text or a whole number."""
        value = self.values.get(key)
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if not text.strip() or not text.isprintable():
            raise self.unexpected(key, "a printable text or a whole number")
        return text

    def unexpected(self, key: str, expected: str) -> KestrelError:
        found = repr(self.values[key])[:60] if key in self.values else f"only {sorted(self.values)}"
        return KestrelError(f"{self.where}: '{key}' must be {expected}, found {found}.")


def file_type(path: Path) -> FileType:
    """The type of a file, by its first bytes."""
    start = first_bytes(path)
    if start.startswith(b"PAR1"):
        return "parquet"
    # WhatsApp's lines on the iPhone begin with a date in square brackets.
    return "json" if re.match(rb"""\{|\[\s*(?:[]\[{"tfn-]|\d+\s*[],])""", start) else "text"


def sections(path: Path) -> list[str]:
    """The keys of a JSON object of lists that name splits, in the file's order; empty for any other file."""
    if not _JSON_SECTIONS.match(first_bytes(path)):
        return []
    return list(dict.fromkeys(section for section, _ in _json_rows(path)))


def rows(path: Path, section: str | None = None) -> Iterator[Row]:
    """Streams the rows of a JSON, CSV or Parquet file in bounded memory.

    JSON is an array of objects, an object of such arrays by split, or objects one after the other (JSON lines).

    Args:
        section: for a JSON object of arrays, the key whose array is meant; None: all.

    Raises:
        KestrelError: malformed, with the place.
    """
    kind = file_type(path)
    if kind == "parquet":
        yield from _parquet(path)
    elif kind == "json":
        yield from (row for key, row in _json_rows(path) if section in (None, key))
    else:
        yield from _csv(path)


def _csv(path: Path) -> Iterator[Row]:
    # The default limit is 131,072 characters, which a long conversation in one cell exceeds.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    lines = (line for _, line in text_lines(path))
    header = next(lines, "")
    # Excel writes semicolons where numbers have a comma.
    reader = csv.reader(chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        columns = next(reader, [])
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


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_utf8(path) as opened, pq.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield Row(f"{path}: row {number}", values)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise KestrelError(f"{path}: not readable as Parquet after row {number}: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(key of the array, or "", and row) of each object, with one object in memory."""
    by_section = _JSON_SECTIONS.match(first_bytes(path)) is not None
    with open_utf8(path) as file:
        json_text = _JsonText(path, file)
        if by_section:
            json_text.take("{")
            seen: set[str] = set()
            end = ","
            while end == ",":
                key = json_text.value(str)
                if key not in {*SECTIONS} - seen:
                    raise KestrelError(f"{json_text.place()}: the key {key!r} is not one of {[*SECTIONS]}, each once.")
                seen.add(key)
                json_text.take(":")
                yield from _json_array(json_text, key)
                end = json_text.take(",}")
        elif json_text.peek() == "[":
            yield from _json_array(json_text, "")
        else:
            while json_text.peek():
                yield "", Row(json_text.place(), json_text.record())
        if json_text.peek():
            raise KestrelError(f"{json_text.place()}: more text after the end of the JSON value.")


def _json_array(json_text: _JsonText, section: str) -> Iterator[tuple[str, Row]]:
    json_text.take("[")
    end = json_text.take("]") if json_text.peek() == "]" else ","
    index = 0
    while end == ",":
        yield section, Row(f"{json_text.path}: {section}[{index}]", json_text.record())
        index += 1
        end = json_text.take(",]")


class _JsonText:
    """A JSON text read in chunks; the standard library decodes the values."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path = path
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._line, self._line_at = 1, 0  # the line of an index of the text: each line end is counted once

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while not (found := _NOT_BLANK.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._more(_CHUNK):
                return ""
        self._at = found.start()
        return found[0]

    def take(self, expected: str) -> str:
        """Consumes the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            what = f"{found!r}" if found else "the end of the file (is it cut off?)"
            raise KestrelError(f"{self.place()}: expected one of {' '.join(expected)}, found {what}.")
        self._at += 1
        return found

    def record(self) -> dict[str, Any]:
        """Consumes an object; a list of objects is taken as one conversation's messages."""
        value = self.value(dict, list)
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return {"messages": value}
        if not isinstance(value, dict):
            raise KestrelError(f"{self.place()}: expected an object of JSON, found {value!r:.60}.")
        return value

    def value(self, *kinds: type) -> Any:
        """Consumes a value, which must be of a kind. One that the chunk cuts off is tried again with more text."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                break
            except RecursionError as error:
                raise KestrelError(f"{self.place()}: not JSON (nested too deeply).") from error
            except ValueError as error:
                offset = getattr(error, "pos", self._at) - self._at  # `_more` moves the text
                if len(self._text) - self._at > _LONGEST_VALUE or not self._more(size):
                    begins, reason = self.place(), str(error)
                    if isinstance(error, json.JSONDecodeError):
                        line = self._line_of(self._at + offset)
                        reason = f"{error.msg} at character {offset + 1} of the value, line {line}"
                    raise KestrelError(f"{begins}: not JSON ({reason}).") from error
                size *= 2
        if not isinstance(value, kinds):
            name = "an object" if dict in kinds else "a text"
            raise KestrelError(f"{self.place()}: expected {name} of JSON, found {value!r:.60}.")
        self._at = end
        return value

    def place(self) -> str:
        """`file:line` of the next character."""
        return f"{self.path}:{self._line_of(self._at)}"

    def _line_of(self, at: int) -> int:
        self._line += self._text.count("\n", self._line_at, at)
        self._line_at = at
        return self._line

    def _more(self, size: int) -> bool:
        """Reads on; False at the end of the file."""
        self._line_of(self._at)
        self._text = self._text[self._at :]
        self._at = self._line_at = 0
        raw = self._file.read(size)
        try:
            self._text += self._utf8.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            byte = self._file.tell() - len(error.object) + error.start + 1
            raise not_utf8(f"{self.path}:{line}: byte {byte} of the file", error, self.path) from error
        return bool(raw)
