"""Kestrel's own JSON lines, for your own dialogues: one object a line.

    {"persona": ["I have two dogs."],
     "turns": [{"speaker": "partner", "text": "Hi!"}, {"speaker": "self", "text": "Hello, my dogs say hi too."}]}

docs/your-own-data.md describes the optional keys; other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row
from kestrel.errors import KestrelError

COLUMNS = [{"persona", "turns"}]


def read(file: SourceFile) -> Iterator[RawDialogue]:
    for index, row in enumerate(file.rows()):
        dialogue_id = row.identifier("dialogue_id") if "dialogue_id" in row.values else file.dialogue_id(index)
        yield RawDialogue(
            where=row.where,
            dialogue_id=dialogue_id,
            conversation_id=row.identifier("conversation_id") if "conversation_id" in row.values else dialogue_id,
            persona=row.texts("persona"),
            partner_persona=row.texts("partner_persona") if "partner_persona" in row.values else (),
            turns=tuple(_turns(row)),
        )


def _turns(row: Row) -> Iterator[RawTurn]:
    turns = row.objects("turns")
    candidates = row.values.get("candidates") or []
    replies = sum(turn.text("speaker") == "self" for turn in turns)
    if not isinstance(candidates, list) or len(candidates) not in (0, replies):
        raise KestrelError(f"{row.where}: 'candidates' must be a list with one list for each of {replies} replies.")
    lists = (Row(f"{row.where}, candidates", {"candidates": each}).texts("candidates") for each in candidates)
    for turn in turns:
        match turn.text("speaker"):
            case "self":
                yield RawTurn("self", turn.text("text"), next(lists, ()))
            case "partner":
                yield RawTurn("partner", turn.text("text"))
            case other:
                raise KestrelError(f"{turn.where}: 'speaker' must be 'partner' or 'self', found {other[:60]!r}.")
