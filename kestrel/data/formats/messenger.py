"""Facebook's and Instagram's "Download your information" as JSON (`message_1.json`): a chat, the newest message first."""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data import chat_log
from kestrel.data.chat_log import Message
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.data.rows import Row

COLUMNS = [{"participants", "messages"}]


def read(file: SourceFile) -> Iterator[RawDialogue]:
    return chat_log.dialogues(file, _messages(file))


def _messages(file: SourceFile) -> Iterator[Message]:
    for number, row in enumerate(file.rows()):
        messages = [(message.number("timestamp_ms") / 1000, message) for message in row.objects("messages")]
        for time, message in sorted(messages, key=lambda each: each[0]):
            if message.values.get("is_unsent"):
                file.counts.repair(chat_log.DELETED, message.where)
            elif not message.values.get("content"):
                file.counts.repair(chat_log.MEDIA, message.where)
            else:
                yield Message(time, _text(message, "sender_name"), _text(message, "content"), message.where, number)


def _text(message: Row, key: str) -> str:
    """The export writes each byte of UTF-8 as a character of its own ("Ã©" for "é")."""
    text = message.text(key)
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text
