"""Which format a file has, by its content. A new format is one module and one entry in `FORMATS`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from kestrel.data.formats import cynaptics, huggingface, kaggle, own, parlai, synthetic, truecased
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.data.rows import file_type
from kestrel.errors import KestrelError


class Format(Protocol):
    """What the module of a format holds."""

    COLUMNS: set[str]
    """What the first row must have; empty for ParlAI's numbered lines."""

    def read(self, file: SourceFile) -> Iterator[RawDialogue]:
        """The dialogues of one file, in its order, as they are there."""


FORMATS: dict[str, Format] = {
    "parlai": parlai,
    "huggingface": huggingface,
    "truecased": truecased,
    "cynaptics": cynaptics,
    "synthetic": synthetic,
    "kaggle": kaggle,
    "kestrel": own,
}


def recognize(file: SourceFile, expected: str) -> str:
    """The format of a file, from its beginning.

    Args:
        expected: a key of `FORMATS`, which is then only checked, or "auto".

    Raises:
        KestrelError: the file is of no known format, of several, or not of the expected one.
    """
    if file_type(file.path) == "numbered":
        where, content, matching = f"{file.path}:1", "numbered lines", ["parlai"]
    else:
        row = next(file.rows(), None)
        if row is None:
            raise KestrelError(f"{file.path}: the file has no rows.")
        where, content = row.where, f"the columns {sorted(row.values)}"
        matching = [name for name, each in FORMATS.items() if each.COLUMNS and each.COLUMNS <= row.values.keys()]
    if expected in matching:
        return expected
    if expected != "auto":
        hint = f" It looks like {' or '.join(matching)}." if matching else ""
        raise KestrelError(
            f"{where}: not in the format {expected}, which needs {_needs(expected)}; found {content}.{hint}"
        )
    if len(matching) > 1:
        raise KestrelError(f"{where}: this could be {' or '.join(matching)}; set data.format to one of them.")
    if not matching:
        known = "; ".join(f"{name}: {_needs(name)}" for name in FORMATS)
        raise KestrelError(f"{where}: the format is unknown: found {content}. Known formats are {known}.")
    return matching[0]


def _needs(name: str) -> str:
    columns = FORMATS[name].COLUMNS
    return "the columns " + ", ".join(sorted(columns)) if columns else "lines 'N text'"
