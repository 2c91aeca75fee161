"""Chat messages as sets for instruct models have them: OpenAI's `messages`, ShareGPT's `conversations`, and the like.

A message has a role (`role` or `from`) and a text (`content` or `value`; also a list of parts). The system messages
before the first turn are the persona, as they stand; `system` and `persona` beside the messages are read too. The
assistant is the one who is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row
from kestrel.dialogue import Speaker

_LISTS = ("messages", "conversations", "conversation")
COLUMNS = [{key} for key in _LISTS]

_SELF = ("assistant", "gpt", "bot", "model", "chatbot", "chatgpt", "ai", "char", "character")
_PARTNER = ("user", "human", "prompter", "customer", "person")
_SYSTEM = ("system", "developer")
_TOOL = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")
ROLES = {
    **dict.fromkeys(_SELF, "self"),
    **dict.fromkeys(_PARTNER, "partner"),
    **dict.fromkeys(_SYSTEM, "system"),
    **dict.fromkeys(_TOOL, "tool"),
}
_SPEAKERS: dict[str, Speaker] = {"self": "self", "partner": "partner"}

TOOLS = "it calls tools"
NOT_TEXT = "it holds images or other parts that are not text"
UNKNOWN_ROLE = f"a role that is none of {', '.join(ROLES)}"


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """A dialogue a row; one with tool calls, images or a role of another name is dropped and counted."""
    for index, row in enumerate(file.rows()):
        key = next((key for key in _LISTS if row.values.get(key) is not None), _LISTS[0])
        persona = [*_texts(row, "persona"), *_texts(row, "system"), *_texts(row, "system_prompt")]
        turns: list[RawTurn] = []
        why = ""
        for message in row.objects(key):
            role = ROLES.get(_first(message, "role", "from", "speaker").strip().lower(), UNKNOWN_ROLE)
            content = _content(message)
            if message.values.get("tool_calls") or message.values.get("function_call") or role == "tool":
                why = TOOLS
            elif content is None:
                why = NOT_TEXT
            elif role in _SPEAKERS:
                turns.append(RawTurn(_SPEAKERS[role], content))
            elif role != "system":
                why = role
            elif turns:
                file.counts.repair("system messages left out: after the first turn", message.where)
            else:
                persona.append(content)
            if why:
                file.counts.skip(why, message.where)
                break
        else:
            dialogue_id = file.dialogue_id(index)
            yield RawDialogue(row.where, dialogue_id, tuple(persona), tuple(turns), dialogue_id)


def _texts(row: Row, key: str) -> tuple[str, ...]:
    """A column that need not be there, of one text or a list of texts."""
    value = row.values.get(key)
    return row.texts(key) if isinstance(value, list) else (row.text(key),) if value else ()


def _first(message: Row, *keys: str) -> str:
    return message.text(next((key for key in keys if key in message.values), keys[0]))


def _content(message: Row) -> str | None:
    """The text of a message; None where a part of it is none."""
    key = next((key for key in ("content", "value", "text") if key in message.values), "content")
    if not isinstance(message.values.get(key), list):
        return message.text(key) if key in message.values or not message.values.get("tool_calls") else ""
    parts = [_part(part) for part in message.values[key]]
    return None if None in parts else "".join(filter(None, parts))


def _part(part: Any) -> str | None:
    """The text of a part: a text, or an object with `text` and a type that ends so (text, input_text, output_text)."""
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and str(part.get("type", "text")).endswith("text")
    return part["text"] if is_text and isinstance(part.get("text"), str) else None
