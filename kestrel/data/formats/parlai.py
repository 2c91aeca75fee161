"""ParlAI's text form of Persona-Chat and ConvAI2: self, other, both and none; original and revised; with candidates.

Each line is `N text`, where N counts from 1 within a dialogue. The first lines tell the personas; the others are
`text<TAB>reply[<TAB>reward[<TAB>candidate|...|gold]]`, the reply being the persona's owner's.
Reference: FbDeprecatedDialogTeacher of ParlAI (https://github.com/facebookresearch/ParlAI).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kestrel.data.lines import text_lines
from kestrel.data.repair import Draft, Utterance, opening, persona_key, stable_hash
from kestrel.data.tally import Tally
from kestrel.errors import KestrelError

OWN = "your persona:"
PARTNERS = "partner's persona:"


def read(path: Path, section: str | None, prefix: str, both_sides: bool, tally: Tally) -> Iterator[Draft]:
    """Drafts of one file. A dialogue of a `both` file is followed by the partner's side of it.

    ConvAI2's `both` files hold each conversation once for each owner already; then nothing is added. To know that takes
    a first pass over the file, which keeps 8 bytes a dialogue.

    Raises:
        KestrelError: a malformed line, with file and line.
    """
    told: np.ndarray | None = None
    for draft in _dialogues(path, prefix):
        yield draft
        if both_sides and draft.persona and draft.partner_persona:
            if told is None:
                owners = (_owned(native, native.persona) for native in _dialogues(path, prefix))
                told = np.unique(np.fromiter(owners, np.uint64))
            key = _owned(draft, draft.partner_persona)
            at = int(np.searchsorted(told, key))
            if at == len(told) or told[at] != key:
                yield draft.other_side()


def _owned(draft: Draft, persona: tuple[str, ...]) -> np.uint64:
    """A conversation and one of its owners, in 64 bits."""
    return np.uint64(stable_hash(str(persona_key(persona)), opening(draft.turns)))


def _dialogues(path: Path, prefix: str) -> Iterator[Draft]:
    expected = True
    for index, block in enumerate(_blocks(path)):
        draft = _draft(block, path, f"{prefix}-{index:06d}")
        if index == 0:
            # A file is of one kind: where the first dialogue tells no persona of the owner, the file never does.
            expected = bool(draft.persona)
        yield draft if expected else replace(draft, personas_expected=False)


def _blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    """The lines of one dialogue at a time: (line number, text after the count)."""
    block: list[tuple[int, str]] = []
    for number, line in text_lines(path):
        line = line.rstrip("\r\n")
        told, blank, text = line.partition(" ")
        if not (blank and told.isdecimal() and len(told) < 10):
            if not line.strip():
                continue
            raise KestrelError(f"{path}:{number}: a ParlAI line is a number, a space and text; found {line[:60]!r}.")
        if "\r" in line:
            raise KestrelError(f"{path}:{number}: a carriage return inside the line; convert the line ends.")
        count = int(told)
        if count == 1 and block:
            yield block
            block = []
        if count != len(block) + 1:
            raise KestrelError(
                f"{path}:{number}: line {count} of a dialogue where {len(block) + 1} should stand; are lines missing?"
            )
        block.append((number, text))
    if block:
        yield block


def _draft(block: list[tuple[int, str]], path: Path, dialogue_id: str) -> Draft:
    personas: dict[str, list[str]] = {OWN: [], PARTNERS: []}
    turns: list[Utterance] = []
    for number, text in block:
        fields = text.split("\t")
        owner = OWN if text.startswith(OWN) else PARTNERS if text.startswith(PARTNERS) else None
        if owner and len(fields) == 1 and not turns:
            personas[owner].append(text.removeprefix(owner))
            continue
        if owner or not 2 <= len(fields) <= 4:
            raise KestrelError(
                f"{path}:{number}: expected 'text<TAB>reply[<TAB>reward[<TAB>candidates]]' after the persona lines, "
                f"found {len(fields)} field(s): {text[:60]!r}."
            )
        reply = fields[1]
        candidates = fields[3].split("|") if len(fields) == 4 and fields[3] else []
        if candidates and candidates[-1].strip() == reply.strip():
            candidates.pop()
        turns += (Utterance("partner", fields[0]), Utterance("self", reply, tuple(candidates)))
    return Draft(
        where=f"{path}:{block[0][0]}",
        dialogue_id=dialogue_id,
        persona=tuple(personas[OWN]),
        partner_persona=tuple(personas[PARTNERS]),
        turns=tuple(turns),
    )
