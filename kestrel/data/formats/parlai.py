"""ParlAI's text form of Persona-Chat and ConvAI2: self, other, both and none; original and revised; with candidates.

Each line is `N text`, where N counts from 1 within a dialogue. The first lines are the personas; the others are
`text<TAB>reply[<TAB>reward[<TAB>candidate|...|gold]]`, the reply being the persona's owner's.
Reference: FbDeprecatedDialogTeacher of ParlAI (https://github.com/facebookresearch/ParlAI).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kestrel.data.lines import lines_without_ends
from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.repair import conversation_id_from, persona_key, stable_hash
from kestrel.errors import KestrelError

COLUMNS: list[set[str]] = []  # numbered lines instead
PERSONAS = ("your persona:", "partner's persona:")


def matches(start: str) -> bool:
    """Whether a file that starts so has numbered lines."""
    return re.match(r"\d+ \S", start) is not None


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """A dialogue of a `both` file is followed by the partner's side of it.

    ConvAI2's `both` files already hold each conversation once for each owner; then nothing is added. To find that out
    takes a first pass over the file.
    """
    sides: set[int] = set()
    for dialogue in _dialogues(file):
        yield dialogue
        if file.settings.both_sides and dialogue.persona and dialogue.partner_persona:
            sides = sides or {_side_hash(each, each.persona) for each in _dialogues(file)}
            if _side_hash(dialogue, dialogue.partner_persona) not in sides:
                yield dialogue.other_side()


def _side_hash(dialogue: RawDialogue, persona: tuple[str, ...]) -> int:
    """A conversation and one of its owners, in 64 bits."""
    return stable_hash(str(persona_key(persona)), conversation_id_from(dialogue.turns))


def _dialogues(file: SourceFile) -> Iterator[RawDialogue]:
    persona_expected = None
    for index, block in enumerate(_blocks(file.path)):
        dialogue = _dialogue(block, file.path, file.dialogue_id(index))
        if persona_expected is None:
            # A file is of one kind: where the first dialogue has no persona of the owner, none has.
            persona_expected = bool(dialogue.persona)
        yield replace(dialogue, persona_expected=persona_expected)


def _blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    """The lines of one dialogue at a time: (line number, text after the count)."""
    block: list[tuple[int, str]] = []
    for number, line in lines_without_ends(path):
        digits, space, text = line.partition(" ")
        if not (space and digits.isdecimal() and len(digits) < 10):
            if not line.strip():
                continue
            raise KestrelError(f"{path}:{number}: a ParlAI line is a number, a space and text; found {line[:60]!r}.")
        count = int(digits)
        if count == 1 and block:
            yield block
            block = []
        if count != len(block) + 1:
            raise KestrelError(
                f"{path}:{number}: line {count} of a dialogue where line {len(block) + 1} is expected; are lines missing?"
            )
        block.append((number, text))
    if block:
        yield block


def _dialogue(block: list[tuple[int, str]], path: Path, dialogue_id: str) -> RawDialogue:
    personas: dict[str, list[str]] = {kind: [] for kind in PERSONAS}
    turns: list[RawTurn] = []
    for number, text in block:
        fields = text.split("\t")
        owner = next((kind for kind in personas if text.startswith(kind)), None)
        if owner and len(fields) == 1 and not turns:
            personas[owner].append(text.removeprefix(owner))
            continue
        if owner or not 2 <= len(fields) <= 4:
            raise KestrelError(
                f"{path}:{number}: expected 'text<TAB>reply[<TAB>reward[<TAB>candidates]]' after the persona lines, "
                f"found {len(fields)} field(s): {text[:60]!r}."
            )
        candidates = fields[3].split("|") if len(fields) == 4 and fields[3] else []
        if candidates and candidates[-1].strip() == fields[1].strip():
            candidates.pop()
        turns += (RawTurn("partner", fields[0]), RawTurn("self", fields[1], tuple(candidates)))
    own, partners = map(tuple, personas.values())
    return RawDialogue(f"{path}:{block[0][0]}", dialogue_id, own, tuple(turns), partner_persona=partners)
