"""A conversation: persona, exchanges, and how it is saved as a dialogue and loaded again."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kestrel.data.persona_file import Persona
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import clear_leftovers_of, open_regular, write_atomically

System = Literal["adapter", "base"]
_GREETING = Turn("partner", "hi !")  # turns alternate, so it stands between a card's examples and its first message


@dataclass(frozen=True)
class Exchange:
    """A message of the user and its answers.

    Attributes:
        system: who gave the reply, from which the conversation continues.
        beside: the other system's answer to the same message, which the conversation ignores.
        is_cut: whether the reply ended before the model ended it.
    """

    message: str
    system: System
    reply: str
    beside: dict[System, str] = field(default_factory=dict)
    is_cut: bool = False

    @property
    def replies(self) -> dict[System, str]:
        """All answers by system, the conversation's first."""
        return {self.system: self.reply, **self.beside}


@dataclass
class Conversation:
    """The user is the dialogue's partner; the model speaks as the owner of the persona."""

    persona: Persona
    exchanges: list[Exchange] = field(default_factory=list)
    dialogue_id: str = field(default_factory=lambda: f"chat-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")

    def dialogue(self, *more: Turn) -> Dialogue:
        """What the model is to continue: the persona's examples and first message, the conversation, and further turns."""
        turns = [turn for past in self.exchanges for turn in (Turn("partner", past.message), Turn("self", past.reply))]
        examples, first = self.persona.examples, self.persona.first_message
        opening = [*examples, *([_GREETING] if examples and first else []), *([Turn("self", first)] if first else [])]
        return Dialogue(self.dialogue_id, self.persona.sentences, (*opening, *turns, *more))

    def turns(self) -> list[tuple[str, str]]:
        """Who said what, in order: you, or a system."""
        return [each for past in self.exchanges for each in (("you", past.message), (past.system, past.reply))]

    def edit(self, number: int, text: str) -> str | None:
        """Changes a turn (1: the first message) and drops what was said after it.

        Returns:
            The message that now needs an answer; None after an answer was changed.

        Raises:
            KestrelError: there is no such turn, or no text.
        """
        index, is_answer = divmod(number - 1, 2)
        if not 1 <= number <= 2 * len(self.exchanges) or not text.strip():
            raise KestrelError(f"name a turn from 1 to {2 * len(self.exchanges)} and its new text")
        edited = self.exchanges[index]
        del self.exchanges[index:]
        if not is_answer:
            return text
        self.exchanges.append(replace(edited, reply=text, beside={}, is_cut=False))
        return None

    def as_row(self) -> dict[str, Any]:
        """The conversation in Kestrel's own JSON format, which preprocess.py reads.

        Each turn of the model also names the system that answered, `beside` holds the other system's answer, and
        `stopped_by` says where an answer was cut.

        Raises:
            KestrelError: the conversation is empty.
        """
        if not self.exchanges:
            raise KestrelError("nothing to save: the conversation is empty")
        first = self.persona.first_message
        turns: list[dict[str, Any]] = [{"speaker": "self", "text": first}] if first else []
        for past in self.exchanges:
            turns.append({"speaker": "partner", "text": past.message})
            answer = {"speaker": "self", "text": past.reply, "system": past.system}
            beside = {"beside": past.beside} if past.beside else {}
            turns.append({**answer, **beside, **({"stopped_by": "length"} if past.is_cut else {})})
        return {"dialogue_id": self.dialogue_id, "persona": list(self.persona.sentences), "turns": turns}


def _of_row(row: dict[str, Any]) -> Conversation:
    turns = list(row["turns"])
    first = turns.pop(0)["text"] if turns[0]["speaker"] == "self" else ""
    conversation = Conversation(Persona(tuple(row["persona"]), first_message=first), [], row["dialogue_id"])
    for question, answer in zip(turns[::2], turns[1::2], strict=False):  # a last message may have no answer
        if (question["speaker"], answer["speaker"]) != ("partner", "self"):
            raise ValueError
        cut = answer.get("stopped_by") == "length"
        system: System = "base" if answer.get("system") == "base" else "adapter"
        exchange = Exchange(str(question["text"]), system, str(answer["text"]), dict(answer.get("beside", {})), cut)
        conversation.exchanges.append(exchange)
    return conversation


def _text_of(path: Path) -> str:
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file of dialogues that are not blank, and what they hold; [] if it does not exist."""
    try:
        # Not splitlines, which also cuts at characters that JSON keeps as they are, such as U+2028.
        lines = _text_of(path).split("\n") if path.exists() else []
        rows = [(line, json.loads(line)) for line in lines if line.strip()]
        if not all(isinstance(row, dict) and "turns" in row for _, row in rows):
            raise ValueError
    except (ValueError, RecursionError):  # from JSON, from UTF-8, or the one above
        raise KestrelError(f"{path} does not hold dialogues in JSON lines; name another file") from None
    except OSError as error:
        raise KestrelError(f"{path} cannot be read: {error.strerror or error}; name another file") from None
    return rows


def load(path: Path, dialogue_id: str | None = None) -> Conversation:
    """A conversation from a file that `save` wrote: the one with the given id, or the last.

    Raises:
        KestrelError: the file does not hold it, or cannot be read.
    """
    rows = [row for _, row in _rows(path) if dialogue_id in (None, row.get("dialogue_id"))]
    if not rows:
        raise KestrelError(f"{path} holds no conversation{f' {dialogue_id}' if dialogue_id else ''}")
    try:
        return _of_row(rows[-1])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise KestrelError(f"{path}: its last conversation is no dialogue of a partner and a persona's owner") from None


def save(conversation: Conversation, path: Path) -> int:
    """Adds a conversation to a file of JSON lines; one that was saved before replaces its old line.

    Returns:
        The number of conversations in the file.

    Raises:
        KestrelError: the conversation is empty, or the file holds something else or cannot be written.
    """
    row = conversation.as_row()
    kept = [line for line, other in _rows(path) if other.get("dialogue_id") != row["dialogue_id"]]
    try:
        clear_leftovers_of(path)
        with write_atomically(path) as file:
            file.writelines(f"{line}\n" for line in [*kept, json.dumps(row, ensure_ascii=False)])
    except OSError as error:
        raise KestrelError(f"{path} cannot be written: {error.strerror or error}; name another file") from None
    return len(kept) + 1
