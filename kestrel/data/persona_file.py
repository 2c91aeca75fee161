"""Personas from files: a text file with a sentence a line, or a character card (forms V1 to V3, in JSON or in a PNG picture).

The forms are described at https://github.com/malfoyslastname/character-card-spec-v2 and
https://github.com/kwaroran/character-card-spec-v3.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import open_regular

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 2**26  # bytes of a file
_KEYWORDS = (b"ccv3", b"chara")  # of the text in a picture: the form V3, and the forms before it
_SPEAKER = re.compile(r"^[ \t]*(\{\{user\}\}|\{\{char\}\})[ \t]*:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Persona:
    """Somebody to be.

    Attributes:
        sentences: what is true of them; with a card, also name and scenario.
        first_message: what they say before anybody else does.
        examples: turns that show how they talk; they end with a turn of their own.
    """

    sentences: tuple[str, ...]
    name: str = ""
    first_message: str = ""
    examples: tuple[Turn, ...] = ()


def read_persona(path: Path) -> Persona:
    """The persona in a text file or a character card.

    Raises:
        KestrelError: the file cannot be read, or holds no persona.
    """
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise KestrelError(f"{path}: more than {_LARGEST >> 20} MiB; not a persona")
        if content.startswith(_PNG):
            return _of_card(_in_picture(content, path), path)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise KestrelError(f"{path}: {reason}; a persona is a UTF-8 text file with one sentence a line") from None
    return (
        _of_card(text, path) if text.lstrip().startswith("{") else Persona(sentences_of(text.splitlines(), str(path)))
    )


@functools.cache
def given_sentences(given: tuple[str, ...]) -> tuple[str, ...]:
    """The sentences of data.persona, which may be one file that `read_persona` reads.

    Raises:
        KestrelError: the file cannot be read, or holds no persona.
    """
    is_file = len(given) == 1 and given[0].lower().endswith((".txt", ".json", ".png"))
    return read_persona(Path(given[0])).sentences if is_file else given


def sentences_of(lines: list[str], where: str) -> tuple[str, ...]:
    """The lines that are not blank, with single spaces.

    Raises:
        KestrelError: all are blank.
    """
    sentences = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not sentences:
        raise KestrelError(f"{where}: a persona needs at least one sentence")
    return sentences


def _in_picture(content: bytes, path: Path) -> str:
    """The card's JSON from the text chunks of a PNG file, where it is in Base64."""
    found = {keyword: text for keyword, text in _text_chunks(content) if keyword in _KEYWORDS}
    for keyword in _KEYWORDS:
        if keyword in found:
            return base64.b64decode(found[keyword], validate=False).decode("utf-8")
    raise KestrelError(
        f"{path}: a picture without a character card; name a card, or a text file with one sentence a line"
    )


def _text_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keyword and text of each tEXt chunk."""
    place = len(_PNG)
    while place + 8 <= len(content):
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if kind == b"tEXt":
            keyword, _, text = content[place + 8 : place + 8 + size].partition(b"\0")
            yield keyword, text
        place += 12 + size


def _of_card(text: str, path: Path) -> Persona:
    try:
        card = json.loads(text)
        fields = card["data"] if isinstance(card.get("data"), dict) else card
        name, *parts, scenario, first, example = (
            _text(fields, key) for key in ("name", "description", "personality", "scenario", "first_mes", "mes_example")
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise KestrelError(
            f"{path}: not a character card ({error}); a card is a JSON object with name and description"
        ) from None
    if not name or not any(parts):
        raise KestrelError(f"{path}: not a character card: it has no {'description' if name else 'name'}")

    def filled(text: str) -> str:
        for pattern, words in ((r"\{\{char\}\}|<BOT>", name), (r"\{\{user\}\}|<USER>", "you")):
            text = re.sub(pattern, lambda _, words=words: words, text, flags=re.IGNORECASE)  # type: ignore[misc]
        return text.strip()

    lines = [f"my name is {name}.", *(line for part in parts for line in filled(part).splitlines())]
    lines += [f"scenario: {' '.join(filled(scenario).split())}"] if scenario.strip() else []
    return Persona(sentences_of(lines, str(path)), name, filled(first), _examples(example, filled))


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def _examples(text: str, filled: Any) -> tuple[Turn, ...]:
    """The turns of an example dialogue, in pairs of a partner's turn and the character's."""
    pieces = _SPEAKER.split(re.sub(r"<START>", "", text, flags=re.IGNORECASE))[1:]
    said = [
        (speaker.lower() == "{{char}}", filled(words)) for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    pairs = itertools.pairwise(said)
    return tuple(
        turn
        for (is_own, question), (is_answer, answer) in pairs
        if not is_own and is_answer and question and answer
        for turn in (Turn("partner", question), Turn("self", answer))
    )
