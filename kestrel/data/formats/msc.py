"""Multi-Session Chat: a session a line with both personas; earlier sessions of the two people beside it.

Reference: Xu et al. 2022, https://arxiv.org/abs/2107.07567 (ParlAI's msc, JSON lines in `.txt` or `.jsonl`).
"""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row

COLUMNS = [{"personas", "dialog"}]

_LEFT_OUT = "earlier sessions left out (data.earlier_sessions)"
_READ = "earlier sessions read before the dialogue"


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """The side of the second speaker, who answers first, then that of the first where `data.both_sides`.

    Sessions of the same two people share their conversation, so that they are in one split.
    """
    for index, row in enumerate(file.rows()):
        earlier = row.objects("previous_dialogs") if row.values.get("previous_dialogs") else []
        wanted = file.settings.earlier_sessions
        file.counts.repair(_READ if wanted else _LEFT_OUT, row.where, len(earlier))
        turns = tuple(turn for session in (*(earlier if wanted else ()), row) for turn in _turns(session))
        personas = row.items("personas")
        if len(personas) != 2:
            raise row.unexpected("personas", "two lists of texts")
        one, two = (Row(f"{row.where}, personas", {"persona": persona}).texts("persona") for persona in personas)
        metadata = row.object("metadata") if row.values.get("metadata") else row
        known = metadata.values.get("initial_data_id")
        conversation_id = metadata.identifier("initial_data_id") if known else file.dialogue_id(index)
        yield from file.sides(RawDialogue(row.where, file.dialogue_id(index), two, turns, conversation_id, one))


def _turns(session: Row) -> Iterator[RawTurn]:
    """Turns say who speaks ("Speaker 1" and "Speaker 2", or "bot_0" and "bot_1"), or alternate."""
    turns = session.objects("dialog")
    names = sorted({turn.text("id") for turn in turns if turn.values.get("id")})
    for at, turn in enumerate(turns):
        second = turn.values.get("id") == names[1] if len(names) == 2 else at % 2 == 1
        yield RawTurn("self" if second else "partner", turn.text("text"))
