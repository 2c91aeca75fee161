"""Kaggle's personality.csv: `Persona` in one text, `chat` with a turn a line; the persona's owner speaks second."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile

COLUMNS = [{"Persona", "chat"}]

# The sentences are joined by ". ", after a full stop of their own or not, or by nothing after " ."
_BETWEEN_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!\bmr\.)(?<!\bmrs\.)(?<!\bdr\.)(?<!\bst\.)\.?\s+|(?<=\s\.)(?=\w)", re.IGNORECASE
)


def read(file: SourceFile) -> Iterator[RawDialogue]:
    for index, row in enumerate(file.rows()):
        persona = tuple(_BETWEEN_SENTENCES.split(row.text("Persona").strip()))
        # An empty line is somebody's empty turn: it counts for whose turn it is, and is removed later.
        lines = row.text("chat").strip("\r\n").split("\n")
        turns = tuple(RawTurn("self" if at % 2 else "partner", line) for at, line in enumerate(lines))
        yield RawDialogue(row.where, file.dialogue_id(index), persona, turns)
