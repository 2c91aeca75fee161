"""What the exports of messengers have in common: messages with a time and a name, cut into dialogues by silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row
from kestrel.errors import KestrelError

MEDIA = "messages left out: pictures, files, calls and other media"
SYSTEM = "messages left out: notices by the messenger"
DELETED = "messages left out: deleted by their author"
FORWARDED = "messages left out: forwarded from somebody else"


class Message(NamedTuple):
    """Something that somebody wrote. `time` is in seconds, from any beginning; `chat` tells the chats of a file apart."""

    time: float
    name: str
    text: str
    where: str
    chat: int = 0


def dialogues(file: SourceFile, messages: Iterable[Message]) -> Iterator[RawDialogue]:
    """A dialogue for each stretch without `data.session_gap` hours of silence. All but `data.self` are the partner.

    Raises:
        KestrelError: `data.self` is not set, or no message of any file of the split is by that name.
    """
    names: Counter[str] = Counter()
    session: list[Message] = []
    index = 0
    for message in messages:
        names[message.name] += 1
        silence = abs(message.time - session[-1].time) if session else 0
        if session and (silence > file.settings.session_gap * 3600 or message.chat != session[-1].chat):
            yield _dialogue(file, index, session)
            index, session = index + 1, []
        session.append(message)
    file.names.update(names)
    own = file.settings.self
    if not own or (file.is_last and own not in file.names):
        asked = f"nobody is called {own!r}; set" if own else "a messenger's export; set"
        found = ", ".join(f"{name!r} ({count:,})" for name, count in file.names.most_common(6)) or "nobody"
        where = file.path if names == file.names else file.settings.source
        raise KestrelError(
            f"{where}: {asked} data.self to the name of the one who is learned. Names and their messages: {found}."
        )
    if own not in names:  # somebody who never got an answer, for example
        file.counts.repair(f"files in which nobody is called {own!r} (data.self)", str(file.path))
    if session:
        yield _dialogue(file, index, session)


def seconds(message: Row, key: str) -> float:
    """A time in ISO 8601, with or without its zone, as seconds."""
    try:
        time = datetime.fromisoformat(message.text(key))
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise KestrelError(f"{message.where}: {message.text(key)[:60]!r} is no date and time.") from None


def _dialogue(file: SourceFile, index: int, session: list[Message]) -> RawDialogue:
    where = session[0].where
    if len({message.name for message in session} - {file.settings.self}) > 1:
        file.counts.repair("dialogues in which several people are taken as one partner", where)
    own = file.settings.self
    turns = tuple(RawTurn("self" if message.name == own else "partner", message.text) for message in session)
    return RawDialogue(where, file.dialogue_id(index), (), turns, file.dialogue_id(index))
