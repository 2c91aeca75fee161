"""Telegram Desktop's "Export chat history" as JSON (`result.json`): one chat, or all chats of an account."""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data import chat_log
from kestrel.data.chat_log import Message
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.data.rows import Row

COLUMNS = [{"name", "type", "id", "messages"}, {"chats"}]


def read(file: SourceFile) -> Iterator[RawDialogue]:
    return chat_log.dialogues(file, _messages(file))


def _messages(file: SourceFile) -> Iterator[Message]:
    for number, chat in enumerate(_chats(file)):
        for message in chat.objects("messages"):
            text = _text(message)
            if message.text("type") != "message":
                file.counts.repair(chat_log.SYSTEM, message.where)
            elif message.values.get("forwarded_from"):
                file.counts.repair(chat_log.FORWARDED, message.where)
            elif not text.strip():
                file.counts.repair(chat_log.MEDIA, message.where)
            else:
                # An account that no longer exists has an id without a name.
                name = message.text("from") or "deleted account"
                yield Message(chat_log.seconds(message, "date"), name, text, message.where, number)


def _chats(file: SourceFile) -> Iterator[Row]:
    for row in file.rows():
        if isinstance(chats := row.values.get("chats"), dict):
            yield from Row(row.where, {"chats": chats.get("list")}).objects("chats")
        else:
            yield row


def _text(message: Row) -> str:
    """The text; with links, mentions and the like it is a list of texts and objects."""
    parts = message.values.get("text")
    if not isinstance(parts, list):
        return message.text("text")
    return "".join(part if isinstance(part, str) else Row(message.where, part).text("text") for part in _parts(message))


def _parts(message: Row) -> list[str | dict[str, str]]:
    parts = message.values["text"]
    if not all(isinstance(part, str | dict) for part in parts):
        raise message.unexpected("text", "a text, or a list of texts and objects")
    return list(parts)
