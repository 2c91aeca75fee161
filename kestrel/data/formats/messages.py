"""Chat messages as sets for instruct models have them: OpenAI's `messages`, ShareGPT's `conversations`, and the like.

A message has a role (`role` or `from`) and a text (`content` or `value`; also a list of parts). The system messages
before the first turn are the persona, as they stand; `system` and `persona` beside the messages are read too. The
assistant is the one who is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.read_counts import ReadCounts
from kestrel.data.rows import Row
from kestrel.dialogue import Speaker
from kestrel.errors import KestrelError

_LISTS = ("messages", "conversations", "conversation")
COLUMNS = [{key} for key in _LISTS]

_NAMES = ("role_type", "role", "from", "speaker")
_SELF = ("assistant", "gpt", "bot", "model", "chatbot", "chatgpt", "ai", "char", "character", "output")
_PARTNER = ("user", "human", "prompter", "customer", "person", "input")
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
UNKNOWN_ROLE = "a role that is neither the assistant's, the user's nor the system's"
UNFIT = "not a conversation"


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """A dialogue a row; one with tool calls, images, a role of another name, or of another form is dropped and counted."""
    for index, row in enumerate(file.rows()):
        try:
            dialogue = _dialogue(row, file.dialogue_id(index), file.counts)
        except KestrelError as error:
            file.counts.skip(UNFIT, str(error).removesuffix("."))
            continue
        if dialogue is not None:
            yield dialogue


def _dialogue(row: Row, dialogue_id: str, counts: ReadCounts) -> RawDialogue | None:
    key = next((key for key in _LISTS if row.values.get(key) is not None), _LISTS[0])
    persona = [*_texts(row, "persona"), *_texts(row, "system"), *_texts(row, "system_prompt")]
    turns: list[RawTurn] = []
    for message in _messages(row, key):
        name = _first(message, *_NAMES)
        role = ROLES.get(name.strip().lower())
        content = _content(message)
        calls = message.values.get("tool_calls") or message.values.get("function_call") or role == "tool"
        if calls or content is None or role is None:
            why = TOOLS if calls else NOT_TEXT if content is None else UNKNOWN_ROLE
            counts.skip(why, f"{message.where}, by {name[:60]!r}")
            return None
        if role in _SPEAKERS:
            turns.append(RawTurn(_SPEAKERS[role], content))
            if role == "self" and message.values.get("weight") == 0:
                counts.repair("replies learned although their weight is 0", message.where)
        elif turns:
            counts.repair("system messages left out: after the first turn", message.where)
        else:
            persona.append(content)
    return RawDialogue(row.where, dialogue_id, tuple(persona), tuple(turns), dialogue_id)


def _messages(row: Row, key: str) -> Iterator[Row]:
    """Objects with a role; also texts by turns, the user's first, and objects whose keys are the roles."""
    value = row.values.get(key)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        for at, text in enumerate(value):
            yield Row(f"{row.where}, {key}[{at}]", {"role": ("user", "assistant")[at % 2], "content": text})
        return
    for message in row.objects(key):
        if message.values.keys() & set(_NAMES):
            yield message
        else:
            spoken = {name: text for name, text in message.values.items() if name.lower() in ROLES}
            yield from (Row(message.where, {"role": name, "content": text}) for name, text in spoken.items())
            if not spoken:
                raise message.unexpected("role", "a text")


def _texts(row: Row, key: str) -> tuple[str, ...]:
    """A column that need not be there: a text, a list of texts, or a message."""
    value = row.values.get(key)
    if isinstance(value, dict):
        return (_content(row.object(key)) or "",)
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
