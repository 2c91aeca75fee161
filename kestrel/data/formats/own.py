"""Kestrel's own JSON lines, for your own dialogues: one object a line.

    {"persona": ["I have two dogs."],
     "turns": [{"speaker": "partner", "text": "Hi!"}, {"speaker": "self", "text": "Hello, my dogs say hi too."}]}

Optional: `dialogue_id`, `conversation_id` (dialogues that share it never straddle splits), `partner_persona`, and
`candidates`: for each turn by `self`, in order, the distractor replies without the right one. Other keys are ignored.
A line is one side of a conversation; for the other owner's side, write a line of its own with the same
`conversation_id`.
"""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row
from kestrel.errors import KestrelError

COLUMNS = {"persona", "turns"}


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
    speakers = [turn.text("speaker") for turn in turns]
    for turn, speaker in zip(turns, speakers, strict=True):
        if speaker not in ("partner", "self"):
            raise KestrelError(f"{turn.where}: 'speaker' must be 'partner' or 'self', found {speaker[:60]!r}.")
    candidates = row.values.get("candidates") or []
    replies = speakers.count("self")
    if not isinstance(candidates, list) or len(candidates) not in (0, replies):
        raise KestrelError(f"{row.where}: 'candidates' must be a list with one list for each of {replies} replies.")
    lists = (Row(f"{row.where}, candidates", {"candidates": each}).texts("candidates") for each in candidates)
    for turn, speaker in zip(turns, speakers, strict=True):
        if speaker == "self":
            yield RawTurn("self", turn.text("text"), next(lists, ()))
        else:
            yield RawTurn("partner", turn.text("text"))
