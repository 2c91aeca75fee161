"""The hub set Cynaptics/persona-chat: a conversation up to a reply a row; several rows may be cut from one conversation.

Columns: `conv_id`, `persona_b`, `dialogue` (`Persona A: ...`, `Persona B: ...`), `reference` (B's next reply).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.repair import persona_key, stable_hash
from kestrel.errors import KestrelError

COLUMNS = [{"conv_id", "persona_b", "dialogue", "reference"}]

_TAGGED = re.compile(r"\s*Persona ([AB])\s*:(.*)", re.DOTALL)


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """The longest row of each conversation; the shorter cuts of it are counted.

    Rows belong to one conversation when conv_id, persona and first turn are the same. A first pass finds the longest.
    """
    longest: dict[int, tuple[int, int]] = {}  # conversation -> the most lines, minus the row that has them
    for index, row in enumerate(file.rows()):
        lines = row.texts("dialogue")
        conversation = stable_hash(row.identifier("conv_id"), str(persona_key(row.texts("persona_b"))), *lines[:1])
        longest[conversation] = max(longest.get(conversation, (-1, 0)), (len(lines), -index))
    kept = {-index for _, index in longest.values()}
    for index, row in enumerate(file.rows()):
        if index not in kept:
            file.counts.repair("rows left out: a longer row holds the same conversation", row.where)
            continue
        turns = [_turn(line, row.where) for line in row.texts("dialogue")]
        reference = row.text("reference")
        tagged = _TAGGED.fullmatch(reference)
        turns.append(RawTurn("self", tagged[2] if tagged else reference))
        conversation_id = f"{file.id_prefix}:{row.identifier('conv_id')}"
        yield RawDialogue(row.where, file.dialogue_id(index), row.texts("persona_b"), tuple(turns), conversation_id)


def _turn(line: str, where: str) -> RawTurn:
    tagged = _TAGGED.fullmatch(line)
    if not tagged:
        raise KestrelError(f"{where}: 'dialogue' must hold 'Persona A: ...' and 'Persona B: ...', found {line[:60]!r}.")
    return RawTurn("self" if tagged[1] == "B" else "partner", tagged[2])
