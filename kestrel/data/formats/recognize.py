"""Which format a file has, by its content. A new format is one module and one entry in `FORMATS`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from kestrel.data.formats import (
    cynaptics,
    discord,
    dnli,
    huggingface,
    kaggle,
    messages,
    messenger,
    msc,
    own,
    parlai,
    parlai_fields,
    realpersonachat,
    synthetic,
    telegram,
    truecased,
    whatsapp,
    wild,
    xpersona,
)
from kestrel.data.lines import first_bytes
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.data.rows import Row, file_type
from kestrel.errors import KestrelError


class Format(Protocol):
    """What the module of a format holds; one of lines instead of rows has `matches(start)` too."""

    COLUMNS: list[set[str]]
    """What the first row must have, in one of its forms; empty for a format of lines."""

    def read(self, file: SourceFile) -> Iterator[RawDialogue]:
        """The dialogues of one file, in its order, as they are there."""


FORMATS: dict[str, Format] = {
    "parlai": parlai,
    "parlai_fields": parlai_fields,
    "huggingface": huggingface,
    "truecased": truecased,
    "cynaptics": cynaptics,
    "synthetic": synthetic,
    "kaggle": kaggle,
    "kestrel": own,
    "messages": messages,
    "xpersona": xpersona,
    "msc": msc,
    "dnli": dnli,
    "wild": wild,
    "realpersonachat": realpersonachat,
    "whatsapp": whatsapp,
    "telegram": telegram,
    "discord": discord,
    "messenger": messenger,
}
_LINES = {"parlai": parlai, "parlai_fields": parlai_fields, "whatsapp": whatsapp}

_RECIPE = (
    "To learn it as dialogues of one reply, write a line of JSON for each: "
    '{"messages": [{"role": "system", "content": PERSONA}, {"role": "user", "content": ...}, '
    '{"role": "assistant", "content": ...}]}'
)
# What is often given and holds no persona dialogue: columns, what it is, and the way out.
_REFUSED: list[tuple[set[str], str]] = [
    ({"instruction"}, f"these are instructions in Alpaca's form, not dialogues. {_RECIPE}"),
    ({"prompt", "completion"}, f"these are pairs of prompt and completion, not dialogues. {_RECIPE}"),
    ({"prompt", "response"}, f"these are pairs of prompt and response, not dialogues. {_RECIPE}"),
    ({"question", "answer"}, f"these are questions and answers, not dialogues. {_RECIPE}"),
    ({"chosen", "rejected"}, "these are preferences (chosen, rejected); write the chosen messages as `messages`."),
    ({"role", "content"}, 'this is one conversation as a list; put {"messages": [...]} around it, and bring several.'),
    (
        {"from", "value"},
        'this is one conversation as a list; put {"conversations": [...]} around it, and bring several.',
    ),
    ({"AuthorID", "Content"}, "this is a Discord channel as a table; export it as JSON."),
    ({"user", "text", "ts"}, "this is an export of Slack; write its messages as `messages`, or as a table."),
    ({"is_user", "mes"}, "this is a chat of SillyTavern; write its messages as `messages`."),
    ({"mapping", "title"}, "this is an account's export of ChatGPT; write its messages as `messages`."),
    ({"interlocutor_id", "persona"}, "these are the personas of RealPersonaChat; set data.source to its dialogues."),
    ({"text"}, "this is a text for each row, without turns; write the turns as `messages` or `turns`."),
]


def recognize(file: SourceFile, expected: str) -> str:
    """The format of a file, from its beginning.

    Args:
        expected: a key of `FORMATS`, which is then only checked, or "auto".

    Raises:
        KestrelError: the file is of no known format, of several, or not of the expected one.
    """
    where, content, columns = f"{file.path}:1", "", set[str]()
    matching: list[str] = []
    if file_type(file.path) == "text":
        start = first_bytes(file.path).decode("utf-8", "replace")
        matching = [name for name, module in _LINES.items() if module.matches(start)]
        line = start.splitlines()[0]
        content = "" if re.search("[,;\t]", line) else f"lines such as {line[:60]!r}"
    if not matching:
        row = _first_row(file, must_exist=not content)
        if row is not None:
            where, columns = where if content else row.where, set(row.values)
            matching = _matching(columns)
            content = content or f"the columns {sorted(columns)}"
    if expected in matching:
        return expected
    if expected != "auto":
        hint = f" It looks like {' or '.join(matching)}." if matching else ""
        raise KestrelError(
            f"{where}: not in the format {expected}, which needs {_needs(expected)}; found {content}.{hint}"
        )
    if len(matching) > 1:
        raise KestrelError(f"{where}: this could be {' or '.join(matching)}; set data.format to one of them.")
    if matching:
        return matching[0]
    for refused, meaning in _REFUSED:
        if refused <= {column.partition(",")[0] for column in columns}:
            raise KestrelError(f"{where}: {meaning}")
    near = [name for name, module in FORMATS.items() if any(needed & columns for needed in module.COLUMNS)]
    nearest = "".join(f" {name} needs {_needs(name)}." for name in near[:3])
    raise KestrelError(
        f"{where}: the format is unknown: found {content}.{nearest} docs/your-own-data.md describes what is read: "
        f"{', '.join(FORMATS)}."
    )


def _first_row(file: SourceFile, must_exist: bool) -> Row | None:
    """The first row; None where lines of text turn out to be no table of one column either."""
    try:
        row = next(file.rows(), None)
        if row is None:
            raise KestrelError(f"{file.path}: the file has no rows.")
    except KestrelError as error:
        if not must_exist:
            return None
        if file_type(file.path) == "text":
            raise KestrelError(
                f"{error} If this is no table, it is in no format that docs/your-own-data.md names."
            ) from None
        raise
    return row


def _matching(columns: set[str]) -> list[str]:
    """The formats whose columns are all there, without those of which another asks for more."""
    fitting = {name: needed for name, module in FORMATS.items() for needed in module.COLUMNS if needed <= columns}
    return [name for name, needed in fitting.items() if not any(needed < other for other in fitting.values())]


def _needs(name: str) -> str:
    if not FORMATS[name].COLUMNS:
        return _LINE_FORMS[name]
    return " or ".join("the columns " + ", ".join(sorted(columns)) for columns in FORMATS[name].COLUMNS)


_LINE_FORMS = {
    "parlai": "lines 'N text'",
    "parlai_fields": "lines 'text:...<TAB>labels:...'",
    "whatsapp": "lines 'date, time - name: text'",
}
