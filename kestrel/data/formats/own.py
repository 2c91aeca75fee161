"""Kestrel's own JSON lines, for people who bring their own dialogues: one object a line.

    {"persona": ["I have two dogs."],
     "turns": [{"speaker": "partner", "text": "Hi!"}, {"speaker": "self", "text": "Hello, my dogs say hi too."}]}

Optional: `dialogue_id`, `conversation_id` (dialogues that share it never straddle splits), `partner_persona`, and
`candidates`: for each turn by `self`, in order, the distractor replies without the right one. Other keys are ignored.
A line is one side of a conversation; for the other owner's side, write a line of its own with the same
`conversation_id`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kestrel.data.repair import Draft, Utterance
from kestrel.data.rows import Row, rows
from kestrel.data.tally import Tally
from kestrel.errors import KestrelError


def read(path: Path, section: str | None, prefix: str, both_sides: bool, tally: Tally) -> Iterator[Draft]:
    """Drafts of one file."""
    for index, row in enumerate(rows(path, section)):
        dialogue_id = row.label("dialogue_id") if "dialogue_id" in row.values else f"{prefix}-{index:06d}"
        yield Draft(
            where=row.where,
            dialogue_id=dialogue_id,
            conversation_id=row.label("conversation_id") if "conversation_id" in row.values else dialogue_id,
            persona=row.texts("persona"),
            partner_persona=row.texts("partner_persona") if "partner_persona" in row.values else (),
            turns=tuple(_turns(row)),
        )


def _turns(row: Row) -> Iterator[Utterance]:
    turns = row.objects("turns")
    speakers = [turn.text("speaker") for turn in turns]
    for turn, speaker in zip(turns, speakers, strict=True):
        if speaker not in ("partner", "self"):
            raise KestrelError(f"{turn.where}: 'speaker' must be 'partner' or 'self', found {speaker[:60]!r}.")
    offers = row.values.get("candidates") or []
    replies = speakers.count("self")
    if not isinstance(offers, list) or len(offers) not in (0, replies):
        raise KestrelError(f"{row.where}: 'candidates' must be a list with one list for each of {replies} replies.")
    lists = (Row(f"{row.where}, candidates", {"candidates": offer}).texts("candidates") for offer in offers)
    for turn, speaker in zip(turns, speakers, strict=True):
        if speaker == "self":
            yield Utterance("self", turn.text("text"), next(lists, ()))
        else:
            yield Utterance("partner", turn.text("text"))
