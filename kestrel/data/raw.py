"""What a reader of a format is given and what it yields: one file of a source, and dialogues before repair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from kestrel.config.settings import Data
from kestrel.data.read_counts import ReadCounts
from kestrel.data.rows import Row, rows
from kestrel.dialogue import Speaker


@dataclass(frozen=True)
class SourceFile:
    """A file, or one section of a JSON file, that belongs to one split.

    Attributes:
        section: of a JSON object of lists, the key whose list is meant; None: the whole file.
        id_prefix: begins the ids of dialogues that the source does not name.
        settings: what the user wants of the source.
        counts: where the reader counts what it repairs or drops.
        names: who wrote how many messages, in the files of the split that were read before.
        is_last: whether no file of the split follows.
    """

    path: Path
    section: str | None = None
    id_prefix: str = ""
    settings: Data = field(default_factory=lambda: Data(source="-"))
    counts: ReadCounts = field(default_factory=ReadCounts)
    names: Counter[str] = field(default_factory=Counter)
    is_last: bool = True

    def rows(self) -> Iterator[Row]:
        return rows(self.path, self.section)

    def dialogue_id(self, index: int) -> str:
        """The id of the dialogue at an index of the file, from 0, where the source does not name it."""
        return f"{self.id_prefix}-{index:06d}"

    def sides(self, dialogue: RawDialogue) -> Iterator[RawDialogue]:
        """A dialogue, and its other side where that has a persona and `data.both_sides` wants it."""
        yield dialogue
        if self.settings.both_sides and dialogue.partner_persona:
            yield dialogue.other_side()


class RawTurn(NamedTuple):
    """A turn as the source has it. `candidates` are the distractors, without the gold reply that closes the list."""

    speaker: Speaker
    text: str
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawDialogue:
    """A dialogue as the source has it, before repair.

    Attributes:
        where: file and line or row, for messages.
        conversation_id: empty where the source has none; the first turns then identify the conversation.
        persona_expected: False for sources that never state the owner's persona (ParlAI's none and other).
    """

    where: str
    dialogue_id: str
    persona: tuple[str, ...]
    turns: tuple[RawTurn, ...]
    conversation_id: str = ""
    partner_persona: tuple[str, ...] = ()
    persona_expected: bool = True

    def other_side(self) -> RawDialogue:
        """The same conversation for its other owner. Candidates belong to this side's replies and are left out."""
        swapped = tuple(RawTurn("partner" if turn.speaker == "self" else "self", turn.text) for turn in self.turns)
        return replace(
            self,
            dialogue_id=self.dialogue_id + "-partner",
            persona=self.partner_persona,
            partner_persona=self.persona,
            turns=swapped,
        )
