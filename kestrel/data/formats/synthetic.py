"""Synthetic-Persona-Chat (CSV, and the hub set google/Synthetic-Persona-Chat): both personas, text by a language model.

The conversations are messy. These repairs are made and counted:

- Placeholders ("[user 1's name]", "(name)", "User 2" used as a name): a form of address is removed ("Nice to meet you,
  [name]." becomes "Nice to meet you."); otherwise the sentence with the placeholder is removed, except for a greeting at
  its beginning. An utterance of which nothing remains is removed together with the one that it answers, so that the
  speakers still alternate.
- Markdown around the speaker's tag ("*User 1:* Hi!", "* User 1: Hi! *") is removed.
- Lines without a speaker: after an utterance that ends with a colon they continue it (a recipe, a list); any others are
  narration ("[A few minutes later]", "At the gym", "Adam: You too.", "* * *") and are left out.

Source: Jandaghi et al. 2023, https://arxiv.org/abs/2312.10007.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.read_counts import ReadCounts

_PERSONAS = ("user 1 personas", "user 2 personas")
_CONVERSATION = "Best Generated Conversation"
COLUMNS = [{*_PERSONAS, _CONVERSATION}]

_TAG = re.compile(r"(?P<mark>[*_#>\s-]*)user ?(?P<user>[12])\s*[*_]*\s*:(?P<text>.*)", re.IGNORECASE | re.DOTALL)
_WORDS = r"name|city|town|hometown|country|state|age|job|location|place|school|company"
_PLACEHOLDER = (
    r"(?:\[[^\]]*\]?|\{[^}]*\}?|<\w[^>]*>"
    rf"|\((?:(?:your|my|first|last|user ?_?[12])(?:'s)? )?(?:user|{_WORDS})\)|\(user ?[12]\)|\buser ?_?[12]\b(?:'s)?)"
)
_HAS_PLACEHOLDER = re.compile(_PLACEHOLDER, re.IGNORECASE)
_ADDRESS = re.compile(
    rf",\s*{_PLACEHOLDER}(?=\s*(?:[.!?,]|$))|(?<=\bhi) {_PLACEHOLDER}(?=[,.!])|(?<=\bhello) {_PLACEHOLDER}(?=[,.!])"
    rf"|(?<=\bhey) {_PLACEHOLDER}(?=[,.!])",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_GREETING = re.compile(r"\s*(?:hi|hello|hey)(?: there)?(?=[,.! ])", re.IGNORECASE)
_ASIDE = re.compile(r"[\[(*].*[\])*]")


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """User 2, who answers first as in the other sources, then user 1 where `both_sides`."""
    for index, row in enumerate(file.rows()):
        one, two = (tuple(line for line in row.text(key).split("\n") if line.strip()) for key in _PERSONAS)
        spoken = _conversation(row.text(_CONVERSATION), row.where, file.counts)
        turns = tuple(RawTurn("partner" if user == "1" else "self", text) for user, text in spoken)
        dialogue_id = file.dialogue_id(index)
        yield from file.sides(RawDialogue(row.where, dialogue_id, two, turns, dialogue_id, one))


def _conversation(text: str, where: str, counts: ReadCounts) -> list[tuple[str, str]]:
    """(user, utterance) in order, without placeholders and narration."""
    spoken: list[tuple[str, str]] = []
    for user, utterance in _utterances(text, where, counts):
        kept = _without_placeholders(utterance, where, counts)
        if kept.strip():
            spoken.append((user, kept))
        else:
            counts.repair("utterances left out: nothing but a placeholder", where)
            if spoken and spoken[-1][0] != user:
                spoken.pop()
                counts.repair("utterances left out: the answer was nothing but a placeholder", where)
    return spoken


def _utterances(text: str, where: str, counts: ReadCounts) -> Iterator[tuple[str, str]]:
    user, utterance, open_ended = "", "", False
    for line in text.splitlines():
        line = line.strip()
        tagged = _TAG.fullmatch(line)
        if tagged and not _ASIDE.fullmatch(tagged["text"].strip()):
            if user:
                yield user, utterance
            user, utterance = tagged["user"], tagged["text"].strip()
            if tagged["mark"]:
                counts.repair("utterances freed of markdown", where)
                utterance = utterance.strip("*_ ")
            open_ended = utterance.endswith(":")
        elif line and open_ended and not _ASIDE.fullmatch(line):
            counts.repair("lines joined to the utterance they continue", where)
            utterance += " " + line
        elif line:
            counts.repair("lines left out: narration, or an unknown speaker", where)
    if user:
        yield user, utterance


def _without_placeholders(text: str, where: str, counts: ReadCounts) -> str:
    if not _HAS_PLACEHOLDER.search(text):
        return text
    text, times = _ADDRESS.subn("", text)
    counts.repair("placeholders left out: a form of address", where, times)
    kept = []
    for sentence in _SENTENCE_END.split(text):
        if not _HAS_PLACEHOLDER.search(sentence):
            kept.append(sentence)
            continue
        counts.repair("sentences left out: a placeholder", where)
        if greeting := _GREETING.match(sentence):
            kept.append(greeting[0].strip() + "!")
    return " ".join(kept)
