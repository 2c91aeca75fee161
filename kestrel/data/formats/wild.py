"""ConvAI2's human evaluation logs: people who play a persona (`user_profile`) talk to the competition's bots.

The human is the one who is learned; what the bots say is the partner's.
Reference: https://github.com/DeepPavlovAdmin/convai (data_tolokers.json and others; hub set conv_ai_2).
"""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row

COLUMNS = [{"dialog", "user_profile"}]

_NO_HUMAN = "nobody in it is marked as human"


def read(file: SourceFile) -> Iterator[RawDialogue]:
    for index, row in enumerate(file.rows()):
        messages = row.objects("dialog")
        human = [_is_human(row, message) for message in messages]
        if not any(human):
            file.counts.skip(_NO_HUMAN, row.where)
            continue
        turns = (
            RawTurn("self" if is_human else "partner", message.text("text"))
            for is_human, message in zip(human, messages, strict=True)
        )
        own, partners = _profile(row, "user_profile"), _profile(row, "bot_profile")
        dialogue_id = file.dialogue_id(index)
        yield RawDialogue(row.where, dialogue_id, own, tuple(turns), dialogue_id, partners)


def _is_human(row: Row, message: Row) -> bool:
    """By the message itself, or by what the dialogue says of the participant."""
    if message.values.get("sender_class"):
        return message.text("sender_class").lower() in ("human", "user")
    participant = row.values.get(f"{message.values.get('sender')}_id")
    kind = participant.get("class") if isinstance(participant, dict) else None
    return str(kind).lower() in ("human", "user")


def _profile(row: Row, key: str) -> tuple[str, ...]:
    """A list of sentences; the Hub's copy has each sentence in a list of its own."""
    items = row.items(key) if row.values.get(key) else []
    flat = [text for item in items for text in (item if isinstance(item, list) else [item])]
    return Row(row.where, {key: flat}).texts(key)
