"""Other orders of a persona's sentences, to see how far a model's answers depend on the one that was given."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace

from kestrel.dialogue import Dialogue

_NAME = re.compile(r"(?P<system>.+)-order(?P<order>[1-9][0-9]*)", re.DOTALL)


def reordered(dialogue: Dialogue, seed: int, order: int) -> Dialogue:
    """The dialogue with its persona's sentences shuffled.

    Args:
        seed: of the run.
        order: 0 is the order as given. The shuffle of any other number depends on seed, dialogue and number alone, so
            that it is the same in every process and whichever other orders are asked for.

    Returns:
        An order that reads otherwise than the given one; the dialogue itself where fewer than two sentences differ.
    """
    if order == 0 or len(set(dialogue.persona)) < 2:
        return dialogue
    digest = hashlib.sha256(json.dumps([seed, dialogue.dialogue_id, order]).encode()).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    persona = list(dialogue.persona)
    while tuple(persona) == dialogue.persona:
        generator.shuffle(persona)
    return replace(dialogue, persona=tuple(persona))


def name_in_order(system: str, order: int) -> str:
    """What a system is called in the name of its file: SYSTEM, or SYSTEM-orderK."""
    return f"{system}-order{order}" if order else system


def order_in_name(name: str) -> tuple[str, int]:
    """The opposite of `name_in_order`: system and order."""
    found = _NAME.fullmatch(name)
    return (found["system"], int(found["order"])) if found else (name, 0)
