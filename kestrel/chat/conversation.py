"""A conversation as it grows: persona, exchanges, what was answered beside them, and its line in a file of dialogues."""

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
    """A message and what was answered.

    Attributes:
        message: what the user said.
        system: who answered.
        reply: the answer that the conversation goes on from.
        beside: what another system answered in its place, by system; the conversation does not know of it.
    """

    message: str
    system: System
    reply: str
    beside: dict[System, str] = field(default_factory=dict)


def _new_id() -> str:
    return f"chat-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@dataclass
class Conversation:
    """The user is the partner, the model speaks as the owner of the persona.

    Attributes:
        persona: the owner's sentences.
        exchanges: in order.
        dialogue_id: of its line in a file; a conversation that begins anew gets another.
    """

    persona: tuple[str, ...]
    exchanges: list[Exchange] = field(default_factory=list)
    dialogue_id: str = field(default_factory=_new_id)

    def reset(self, persona: tuple[str, ...] | None = None) -> None:
        """Begins anew, as another person if one is given: what was said was said by the former one."""
        self.persona = self.persona if persona is None else persona
        self.exchanges, self.dialogue_id = [], _new_id()

    def dialogue(self, message: str) -> Dialogue:
        """What has been said, up to a new message that has no answer yet."""
        turns = [turn for said in self.exchanges for turn in (Turn("partner", said.message), Turn("self", said.reply))]
        return Dialogue(self.dialogue_id, self.persona, (*turns, Turn("partner", message)))

    def as_row(self) -> dict[str, Any]:
        """The conversation as Kestrel's own JSON lines hold it.

        Beyond what preprocess.py reads, each turn of the model says which system spoke, and `beside` what another one
        said in its place.

        Raises:
            KestrelError: nothing has been said yet.
        """
        if not self.exchanges:
            raise KestrelError("nothing has been said yet, so there is nothing to save")
        turns: list[dict[str, Any]] = []
        for said in self.exchanges:
            turns.append({"speaker": "partner", "text": said.message})
            turns.append({"speaker": "self", "text": said.reply, "system": said.system})
            if said.beside:
                turns[-1]["beside"] = said.beside
        return {"dialogue_id": self.dialogue_id, "persona": list(self.persona), "turns": turns}


def save(conversation: Conversation, path: Path) -> int:
    """Writes a conversation into a file of JSON lines, beside others that it holds.

    Saved again, a conversation takes the place of its former line, so that one file can collect many.

    Returns:
        Conversations that the file holds now.

    Raises:
        KestrelError: nothing to save, the file is something else, or it cannot be written.
    """
    row = conversation.as_row()
    lines: list[str] = []
    try:
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        known = [json.loads(line) for line in lines]
        if not all(isinstance(other, dict) and "turns" in other for other in known):
            raise ValueError
        kept = [
            line for line, other in zip(lines, known, strict=True) if other.get("dialogue_id") != row["dialogue_id"]
        ]
        with write_atomically(path) as file:
            file.writelines(f"{line}\n" for line in [*kept, json.dumps(row, ensure_ascii=False)])
    except ValueError:  # of JSON, of UTF-8, or the one above
        raise KestrelError(f"{path} holds something else than dialogues in JSON lines; name another file") from None
    except OSError as error:
        raise KestrelError(f"{path} cannot be written: {error.strerror or error}; name another file") from None
    return len(kept) + 1


def read_persona(path: Path) -> tuple[str, ...]:
    """A persona's sentences from a text file, one a line.

    Raises:
        KestrelError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise KestrelError(f"{path}: not UTF-8 text (byte {error.start}); a persona is one sentence a line") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise KestrelError(f"{path}: {reason}; a persona is a text file with one sentence a line") from None
    return sentences(text.splitlines(), str(path))


def sentences(lines: list[str], where: str) -> tuple[str, ...]:
    """The lines that say something.

    Raises:
        KestrelError: there is none.
    """
    found = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not found:
        raise KestrelError(f"{where}: a persona needs at least one sentence")
    return found
