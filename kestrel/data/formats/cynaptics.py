"""The hub set Cynaptics/persona-chat: a conversation up to a reply a row; several rows may be cut from one conversation.

Columns: `conv_id`, `persona_b`, `dialogue` (`Persona A: ...`, `Persona B: ...`), `reference` (B's next reply).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator

import numpy as np

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.repair import persona_key, stable_hash
from kestrel.data.rows import Row
from kestrel.errors import KestrelError

COLUMNS = {"conv_id", "persona_b", "dialogue", "reference"}

_TAGGED = re.compile(r"\s*Persona ([AB])\s*:(.*)", re.DOTALL)


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """The longest row of each conversation; the shorter cuts of it are counted.

    Rows belong to one conversation when conversation, persona and first turn are the same. A first pass keeps 12 bytes a
    row to find the longest.
    """
    conversations, lengths = array("Q"), array("I")
    for row in file.rows():
        conversations.append(_conversation_hash(row))
        lengths.append(len(row.texts("dialogue")))
    longest = _longest(np.frombuffer(conversations, np.uint64), np.frombuffer(lengths, np.uint32))
    for index, row in enumerate(file.rows()):
        if not longest[index]:
            file.counts.repair("rows left out: a longer row holds the same conversation", row.where)
            continue
        turns = [_turn(line, row.where) for line in row.texts("dialogue")]
        reference = row.text("reference")
        tagged = _TAGGED.fullmatch(reference)
        turns.append(RawTurn("self", tagged[2] if tagged else reference))
        conversation_id = f"{file.id_prefix}:{row.identifier('conv_id')}"
        yield RawDialogue(row.where, file.dialogue_id(index), row.texts("persona_b"), tuple(turns), conversation_id)


def _longest(conversations: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Marks the longest row of each conversation, the first of several: bool of shape (rows,)."""
    order = np.lexsort((-lengths.astype(np.int64), conversations))  # stable, so that the first of several stays first
    first = np.ones(len(order), bool)
    first[1:] = conversations[order[1:]] != conversations[order[:-1]]
    longest = np.zeros(len(order), bool)
    longest[order[first]] = True
    return longest


def _conversation_hash(row: Row) -> int:
    return stable_hash(row.identifier("conv_id"), str(persona_key(row.texts("persona_b"))), *row.texts("dialogue")[:1])


def _turn(line: str, where: str) -> RawTurn:
    tagged = _TAGGED.fullmatch(line)
    if not tagged:
        raise KestrelError(f"{where}: 'dialogue' must hold 'Persona A: ...' and 'Persona B: ...', found {line[:60]!r}.")
    return RawTurn("self" if tagged[1] == "B" else "partner", tagged[2])
