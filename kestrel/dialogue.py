"""A persona dialogue, as every reader, the prompt and the metrics use it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

Speaker = Literal["partner", "self"]
SPLITS = ("train", "validation", "test")


class Turn(NamedTuple):
    """One utterance. `self` is the owner of the persona, whose replies are learned; `partner` is the other speaker."""

    speaker: Speaker
    text: str


@dataclass(frozen=True)
class Dialogue:
    """One conversation seen from the side of one persona's owner.

    Attributes:
        dialogue_id: unique in a corpus.
        conversation_id: shared by all dialogues that come from one conversation (both owners of it, or several rows
            of one source); dialogues that share it never straddle two splits.
        persona: the owner's sentences.
        partner_persona: the partner's sentences; empty where the source does not have them.
        turns: in order; speakers alternate, no text is empty, and at least one turn is by `self`.
        candidates: for each turn by `self`, in order, the distractor replies offered by the source (without the
            reference); an empty list where it offers none. One entry for each turn by `self`, or no entry at all.
    """

    dialogue_id: str
    persona: tuple[str, ...]
    turns: tuple[Turn, ...]
    conversation_id: str = ""
    partner_persona: tuple[str, ...] = ()
    candidates: tuple[tuple[str, ...], ...] = field(default=())

    def replies(self) -> Iterator[tuple[int, str]]:
        """The owner's turns: (index into `turns`, text)."""
        for index, turn in enumerate(self.turns):
            if turn.speaker == "self":
                yield index, turn.text


def reordered(dialogue: Dialogue, seed: int, order: int) -> Dialogue:
    """The dialogue with its persona's sentences shuffled.

    Args:
        seed: of the run.
        order: 0 is the order as given. Any other shuffle depends on seed, dialogue and number alone, so that it is the
            same in every process and whichever other orders are generated.

    Returns:
        The dialogue in another order than the given one; unchanged where fewer than two sentences differ.
    """
    if order == 0 or len(set(dialogue.persona)) < 2:
        return dialogue
    digest = hashlib.sha256(json.dumps([seed, dialogue.dialogue_id, order]).encode()).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    persona = list(dialogue.persona)
    while tuple(persona) == dialogue.persona:
        generator.shuffle(persona)
    return replace(dialogue, persona=tuple(persona))
