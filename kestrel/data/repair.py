"""Makes dialogues that hold the invariants of `kestrel.dialogue` from what the readers of all formats find.

Whatever is changed or left out is counted by reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import blake2b
from itertools import islice

from kestrel.config.settings import Data
from kestrel.data.persona_file import given_sentences
from kestrel.data.raw import RawDialogue, RawTurn
from kestrel.data.read_counts import ReadCounts
from kestrel.dialogue import Dialogue, Turn

# Enough to distinguish conversations, and few enough that both owners' versions of one conversation agree: the version
# of the one who spoke first ends one turn earlier, or later, than the other's.
_FIRST_TURNS = 6

_SUSPECT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LINE_BREAK = re.compile("\r\n|[\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029]")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
NO_PERSONA_GIVEN = "no persona"

# What data.redact replaces. A phone number has 7 to 15 digits and is no date.
_REDACTED = {
    "url": (re.compile(r"\b(?:https?://|www\.)[^\s<>\"]+", re.IGNORECASE), "web addresses replaced"),
    "email": (re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64})+"), "e-mail addresses replaced"),
    "phone": (
        re.compile(
            r"(?<![\w.])(?!\d{4}-\d\d?-\d\d?\b|\d\d?[./-]\d\d?[./-]\d{2,4}\b)\+?\(?\d(?:[ ()./-]{0,2}\d){6,14}(?!\w)"
        ),
        "phone numbers replaced",
    ),
}
_NOT_WORD = re.compile(r"[\W_]+")
_ASCII_WORDS = "".join(chr(code) if chr(code).isalnum() else " " for code in range(128))


def stable_hash(*parts: str) -> int:
    """An unsigned 64-bit hash, the same in every process and Python version (BLAKE2b)."""
    joined = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(joined, digest_size=8).digest(), "big")


def normalized(text: str) -> str:
    """Letters and digits in lower case, to compare sentences."""
    if text.isascii():  # the same result, three times as fast
        return " ".join(text.lower().translate(_ASCII_WORDS).split())
    return _NOT_WORD.sub(" ", text.casefold()).strip()


def persona_key(sentences: Iterable[str]) -> int:
    """Identifies a persona, as a set of normalized sentences, by 64 bits."""
    return stable_hash(*sorted({normalized(sentence) for sentence in sentences}))


def is_silence(text: str) -> bool:
    """Whether this is ParlAI's mark for a partner who says nothing, in upper or lower case."""
    return "__" in text and text.strip().startswith("__") and normalized(text) == "silence"


def conversation_id_from(turns: Iterable[RawTurn]) -> str:
    """Identifies a conversation by its first turns, whoever owns the dialogue."""
    texts = (turn.text for turn in turns if turn.text.strip() and not is_silence(turn.text))
    return f"opening-{stable_hash(*map(normalized, islice(texts, _FIRST_TURNS))):016x}"


def repair(raw: RawDialogue, counts: ReadCounts, settings: Data) -> Dialogue | None:
    """The dialogue that a source holds; None where there is none, and the reason is counted.

    Texts are stripped; line breaks of any kind become line feeds, tabs spaces; other control characters and lone
    surrogates are removed; what `data.redact` names is replaced; a persona that is not there is `data.persona`; empty
    turns are removed; neighbours by one speaker are merged (without their candidates, which answered half of the reply);
    the partner's turns after the last reply are removed, since nothing in them can be learned or scored.
    """
    counts.read += 1
    where = raw.where
    clean = partial(_clean, where=where, counts=counts, redact=settings.redact)
    persona = _texts(raw.persona, "persona sentences", clean)
    if settings.persona and not persona:
        persona = _texts(given_sentences(tuple(settings.persona)), "persona sentences", clean)
        counts.personas_given += 1
    partner_persona = _texts(raw.partner_persona, "persona sentences", clean)

    merged: list[RawTurn] = []
    for turn in raw.turns:
        if is_silence(turn.text):
            continue
        text = clean(turn.text)
        if not text:
            counts.repair("turns removed: empty", where)
        elif merged and merged[-1].speaker == turn.speaker:
            counts.repair("turns merged into the turn before: the same speaker", where)
            merged[-1] = RawTurn(turn.speaker, merged[-1].text + " " + text)
        else:
            merged.append(RawTurn(turn.speaker, text, turn.candidates))
    conversation_id = raw.conversation_id or conversation_id_from(merged)

    if raw.persona_expected and not persona:
        counts.drop(NO_PERSONA_GIVEN, where)
        return None
    replies = [index for index, turn in enumerate(merged) if turn.speaker == "self"]
    if not replies:
        counts.drop("no reply by the persona's owner", where)
        return None
    counts.repair("turns removed: by the partner after the last reply", where, len(merged) - 1 - replies[-1])
    turns = tuple([Turn(turn.speaker, turn.text) for turn in merged[: replies[-1] + 1]])
    candidates = tuple([_distractors(merged[index], clean) for index in replies])
    counts.kept += 1
    return Dialogue(
        raw.dialogue_id, persona, turns, conversation_id, partner_persona, candidates if any(candidates) else ()
    )


def _clean(text: str, where: str, counts: ReadCounts, redact: Sequence[str]) -> str:
    if not text.isprintable() and _SUSPECT.search(text):
        lines = _LINE_BREAK.sub("\n", text).replace("\t", " ")
        text = _UNPRINTABLE.sub("", lines)
        counts.repair("texts freed of control characters or broken surrogates", where, int(text != lines))
    for kind, (pattern, unit) in _REDACTED.items() if redact else ():
        text, times = pattern.subn(f"[{kind}]", text) if kind in redact else (text, 0)
        counts.repair(unit, where, times)
    return text.strip()


def _texts(texts: Iterable[str], unit: str, clean: partial[str]) -> tuple[str, ...]:
    cleaned = tuple([clean(text) for text in texts])
    if "" not in cleaned:
        return cleaned
    clean.keywords["counts"].repair(f"{unit} removed: empty", clean.keywords["where"], cleaned.count(""))
    return tuple(filter(None, cleaned))


def _distractors(turn: RawTurn, clean: partial[str]) -> tuple[str, ...]:
    cleaned = _texts(turn.candidates, "candidates", clean)
    counts, where = clean.keywords["counts"], clean.keywords["where"]
    counts.repair("candidates removed: the gold reply among the distractors", where, cleaned.count(turn.text))
    return tuple(text for text in cleaned if text != turn.text)
