"""A conversation: persona, exchanges, and how it is saved as a dialogue."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import write_atomically

System = Literal["adapter", "base"]


@dataclass(frozen=True)
class Exchange:
    """A message of the user and its answers.

    Attributes:
        system: who gave the reply, from which the conversation continues.
        beside: the other system's answer to the same message, which the conversation ignores.
    """

    message: str
    system: System
    reply: str
    beside: dict[System, str] = field(default_factory=dict)

    @property
    def replies(self) -> dict[System, str]:
        """All answers by system, the conversation's first."""
        return {self.system: self.reply, **self.beside}


@dataclass
class Conversation:
    """The user is the dialogue's partner; the model speaks as the owner of the persona."""

    persona: tuple[str, ...]
    exchanges: list[Exchange] = field(default_factory=list)
    dialogue_id: str = field(default_factory=lambda: f"chat-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}")

    def dialogue(self, message: str) -> Dialogue:
        """The conversation so far, followed by a new message that has no answer yet."""
        turns = [turn for past in self.exchanges for turn in (Turn("partner", past.message), Turn("self", past.reply))]
        return Dialogue(self.dialogue_id, self.persona, (*turns, Turn("partner", message)))

    def as_row(self) -> dict[str, Any]:
        """The conversation in Kestrel's own JSON format, which preprocess.py reads.

        Each turn of the model also names the system that answered, and `beside` holds the other system's answer.

        Raises:
            KestrelError: the conversation is empty.
        """
        if not self.exchanges:
            raise KestrelError("nothing to save: the conversation is empty")
        turns: list[dict[str, Any]] = []
        for past in self.exchanges:
            turns.append({"speaker": "partner", "text": past.message})
            turns.append({"speaker": "self", "text": past.reply, "system": past.system})
            if past.beside:
                turns[-1]["beside"] = past.beside
        return {"dialogue_id": self.dialogue_id, "persona": list(self.persona), "turns": turns}


def save(conversation: Conversation, path: Path) -> int:
    """Adds a conversation to a file of JSON lines; one that was saved before replaces its old line.

    Returns:
        The number of conversations in the file.

    Raises:
        KestrelError: the conversation is empty, or the file holds something else or cannot be written.
    """
    row = conversation.as_row()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        saved = [(line, json.loads(line)) for line in lines if line.strip()]
        if not all(isinstance(other, dict) and "turns" in other for _, other in saved):
            raise ValueError
        kept = [line for line, other in saved if other.get("dialogue_id") != row["dialogue_id"]]
        with write_atomically(path) as file:
            file.writelines(f"{line}\n" for line in [*kept, json.dumps(row, ensure_ascii=False)])
    except ValueError:  # from JSON, from UTF-8, or the one above
        raise KestrelError(f"{path} does not hold dialogues in JSON lines; name another file") from None
    except OSError as error:
        raise KestrelError(f"{path} cannot be written: {error.strerror or error}; name another file") from None
    return len(kept) + 1
