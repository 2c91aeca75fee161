"""The one gate between every reader and the rest: a draft goes in, a dialogue that holds the invariants comes out.

What is changed or left out is counted by reason; nothing is changed silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from kestrel.data.tally import Tally
from kestrel.dialogue import Dialogue, Speaker, Turn

# Long enough to tell conversations apart, short enough that both owners' versions of one conversation agree: the
# version of the one who spoke first ends one utterance earlier, or later, than the other's.
OPENING_UTTERANCES = 6

_SUSPECT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LINE_BREAKS = re.compile("\\s*[\t\n\x0b\x0c\r\x1c-\x1f\x85\u2028\u2029]\\s*")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_WORD = re.compile(r"[\W_]+")
_ASCII_WORDS = "".join(chr(code) if chr(code).isalnum() else " " for code in range(128))


class Utterance(NamedTuple):
    """A turn as the source has it. `candidates` are the distractors, without the gold reply that closes the list."""

    speaker: Speaker
    text: str
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A dialogue as the source has it, before repair.

    Attributes:
        where: file and line or row, for messages.
        conversation_id: empty where the source does not tell; then the first utterances stand for the conversation.
        personas_expected: False for sources that never tell the owner's persona (ParlAI's none and other).
    """

    where: str
    dialogue_id: str
    persona: tuple[str, ...]
    turns: tuple[Utterance, ...]
    conversation_id: str = ""
    partner_persona: tuple[str, ...] = field(default=())
    personas_expected: bool = True

    def other_side(self) -> Draft:
        """The same conversation for its other owner. Candidates belong to this side's replies and are left out."""
        swapped = tuple(Utterance("partner" if turn.speaker == "self" else "self", turn.text) for turn in self.turns)
        return replace(
            self,
            dialogue_id=self.dialogue_id + "-partner",
            persona=self.partner_persona,
            partner_persona=self.persona,
            turns=swapped,
        )


def stable_hash(*parts: str) -> int:
    """An unsigned 64-bit hash, the same in every process and Python version (BLAKE2b)."""
    joined = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(joined, digest_size=8).digest(), "big")


def normalised(text: str) -> str:
    """Letters and digits in lower case: what makes two sentences the same sentence."""
    if text.isascii():  # the same, three times as fast
        return " ".join(text.lower().translate(_ASCII_WORDS).split())
    return _NOT_WORD.sub(" ", text.casefold()).strip()


def persona_key(sentences: Iterable[str]) -> int:
    """Identifies a persona, as a set of normalised sentences, by 64 bits."""
    return stable_hash(*sorted({normalised(sentence) for sentence in sentences}))


def is_silence(text: str) -> bool:
    """Whether this is ParlAI's mark for a partner who says nothing, in any casing."""
    return "__" in text and text.strip().startswith("__") and normalised(text) == "silence"


def opening(turns: Iterable[Utterance]) -> str:
    """Names a conversation by its first utterances, whoever owns the dialogue."""
    said = (turn.text for turn in turns if turn.text.strip() and not is_silence(turn.text))
    return f"opening-{stable_hash(*map(normalised, islice(said, OPENING_UTTERANCES))):016x}"


def finish(draft: Draft, tally: Tally) -> Dialogue | None:
    """Makes the dialogue of a draft, or counts why there is none.

    Texts are stripped; line breaks become spaces; other control characters and lone surrogates are removed; empty
    turns go; neighbours by one speaker are merged (and lose their candidates, which answered half of the reply); the
    partner's turns after the last reply go, since nothing there can be learned or scored.

    Args:
        draft: what a reader found.
        tally: `read` grows by one, and `dropped` or `repaired` by what was done; `kept` is the caller's.
    """
    tally.read += 1
    where = draft.where
    persona = _texts(draft.persona, "persona sentences", where, tally)
    partner_persona = _texts(draft.partner_persona, "persona sentences", where, tally)

    merged: list[Utterance] = []
    for turn in draft.turns:
        if is_silence(turn.text):
            continue
        text = _clean(turn.text, where, tally)
        if not text:
            tally.repair("turns removed: empty", where)
        elif merged and merged[-1].speaker == turn.speaker:
            tally.repair("turns merged into the turn before: the same speaker", where)
            merged[-1] = Utterance(turn.speaker, merged[-1].text + " " + text)
        else:
            merged.append(Utterance(turn.speaker, text, turn.candidates))
    conversation_id = draft.conversation_id or opening(merged)

    if draft.personas_expected and not persona:
        tally.drop("no persona", where)
        return None
    replies = [index for index, turn in enumerate(merged) if turn.speaker == "self"]
    if not replies:
        tally.drop("no reply by the persona's owner", where)
        return None
    tally.repair("turns removed: by the partner after the last reply", where, len(merged) - 1 - replies[-1])
    merged = merged[: replies[-1] + 1]

    candidates = tuple([_distractors(merged[index], where, tally) for index in replies])
    return Dialogue(
        dialogue_id=draft.dialogue_id,
        conversation_id=conversation_id,
        persona=persona,
        partner_persona=partner_persona,
        turns=tuple([Turn(turn.speaker, turn.text) for turn in merged]),
        candidates=candidates if any(candidates) else (),
    )


def _clean(text: str, where: str, tally: Tally) -> str:
    if not text.isprintable() and _SUSPECT.search(text):
        stripped = text.strip()
        spaced = _LINE_BREAKS.sub(" ", stripped)
        tally.repair("texts joined: they ran over several lines or held tabs", where, int(spaced != stripped))
        text = _UNPRINTABLE.sub("", spaced)
        tally.repair("texts freed of control characters or broken surrogates", where, int(text != spaced))
    return text.strip()


def _texts(texts: Iterable[str], unit: str, where: str, tally: Tally) -> tuple[str, ...]:
    cleaned = tuple([_clean(text, where, tally) for text in texts])
    if "" not in cleaned:
        return cleaned
    tally.repair(f"{unit} removed: empty", where, cleaned.count(""))
    return tuple(filter(None, cleaned))


def _distractors(turn: Utterance, where: str, tally: Tally) -> tuple[str, ...]:
    if not turn.candidates:
        return ()
    cleaned = _texts(turn.candidates, "candidates", where, tally)
    tally.repair("candidates removed: the gold reply among the distractors", where, cleaned.count(turn.text))
    return tuple(text for text in cleaned if text != turn.text)
