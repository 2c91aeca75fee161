"""Kaggle's personality.csv: `Persona` in one text, `chat` with a turn a line; the persona's owner speaks second."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kestrel.data.repair import Draft, Utterance
from kestrel.data.rows import rows
from kestrel.data.tally import Tally

# The sentences are joined by ". ", after a full stop of their own or not, or by nothing after " ."
_BETWEEN_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!\bmr\.)(?<!\bmrs\.)(?<!\bdr\.)(?<!\bst\.)\.?\s+|(?<=\s\.)(?=\w)", re.IGNORECASE
)


def read(path: Path, section: str | None, prefix: str, both_sides: bool, tally: Tally) -> Iterator[Draft]:
    """Drafts of one file."""
    for index, row in enumerate(rows(path, section)):
        persona = tuple(_BETWEEN_SENTENCES.split(row.text("Persona").strip()))
        # An empty line is somebody's empty turn: it counts for whose turn it is, and is removed later.
        lines = row.text("chat").strip("\r\n").split("\n")
        turns = tuple(Utterance("self" if at % 2 else "partner", line) for at, line in enumerate(lines))
        yield Draft(row.where, f"{prefix}-{index:06d}", persona, turns)
