"""A Discord channel as DiscordChatExporter writes it in JSON. A person goes by nickname or by account name."""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data import chat_log
from kestrel.data.chat_log import Message
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.data.rows import Row

COLUMNS = [{"guild", "channel", "messages"}]

_BY_BOT = "messages left out: by a bot"


def read(file: SourceFile) -> Iterator[RawDialogue]:
    return chat_log.dialogues(file, _messages(file))


def _messages(file: SourceFile) -> Iterator[Message]:
    for row in file.rows():
        for message in row.objects("messages"):
            author = message.object("author")
            if message.text("type") not in ("Default", "Reply"):
                file.counts.repair(chat_log.SYSTEM, message.where)
            elif author.values.get("isBot"):
                file.counts.repair(_BY_BOT, message.where)
            elif not message.text("content").strip():
                file.counts.repair(chat_log.MEDIA, message.where)
            else:
                time = chat_log.seconds(message, "timestamp")
                yield Message(time, _name(author, file.settings.self), message.text("content"), message.where)


def _name(author: Row, own: str | None) -> str:
    names = [author.text(key) for key in ("nickname", "name") if author.values.get(key)]
    return own if own in names else next(iter(names), "deleted account")
