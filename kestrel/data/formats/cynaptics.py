"""The hub set Cynaptics/persona-chat: a conversation up to a reply a row; several rows may be cut from one conversation.

Columns: `conv_id`, `persona_b`, `dialogue` (`Persona A: ...`, `Persona B: ...`), `reference` (B's next reply).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kestrel.data.repair import Draft, Utterance, persona_key, stable_hash
from kestrel.data.rows import Row, rows
from kestrel.data.tally import Tally
from kestrel.errors import KestrelError

_TAGGED = re.compile(r"\s*Persona ([AB])\s*:(.*)", re.DOTALL)


def read(path: Path, section: str | None, prefix: str, both_sides: bool, tally: Tally) -> Iterator[Draft]:
    """Drafts of one file: the longest row of each conversation; the shorter cuts of it are counted.

    Rows belong to one conversation when conversation, persona and first utterance are the same. A first pass keeps
    12 bytes a row to know the longest.
    """
    identities, lengths = array("Q"), array("I")
    for row in rows(path, section):
        identities.append(_identity(row))
        lengths.append(len(row.texts("dialogue")))
    longest = _longest(np.frombuffer(identities, np.uint64), np.frombuffer(lengths, np.uint32))
    for index, row in enumerate(rows(path, section)):
        if not longest[index]:
            tally.repair("rows left out: a longer row holds the same conversation", row.where)
            continue
        turns = [_utterance(line, row.where) for line in row.texts("dialogue")]
        reference = row.text("reference")
        tagged = _TAGGED.fullmatch(reference)
        turns.append(Utterance("self", tagged[2] if tagged else reference))
        conversation_id = f"{prefix}:{row.label('conv_id')}"
        yield Draft(row.where, f"{prefix}-{index:06d}", row.texts("persona_b"), tuple(turns), conversation_id)


def _longest(identities: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of each identity the longest entry, the first of several: bool of shape (n,)."""
    order = np.lexsort((-lengths.astype(np.int64), identities))  # stable, so that the first of several stays first
    first = np.ones(len(order), bool)
    first[1:] = identities[order[1:]] != identities[order[:-1]]
    longest = np.zeros(len(order), bool)
    longest[order[first]] = True
    return longest


def _identity(row: Row) -> int:
    return stable_hash(row.label("conv_id"), str(persona_key(row.texts("persona_b"))), *row.texts("dialogue")[:1])


def _utterance(line: str, where: str) -> Utterance:
    tagged = _TAGGED.fullmatch(line)
    if not tagged:
        raise KestrelError(f"{where}: 'dialogue' must hold 'Persona A: ...' and 'Persona B: ...', found {line[:60]!r}.")
    return Utterance("self" if tagged[1] == "B" else "partner", tagged[2])
