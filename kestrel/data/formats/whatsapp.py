"""WhatsApp's "Export chat": `01/12/24, 10:05 - Ana: text` (Android), `[01.12.24, 10:05:07] Ana: text` (iPhone).

Whether the day, the month or the year comes first depends on the phone's language. The order is taken in which every
date exists and time goes on; of several such, the one that spans the fewest days. Lines without a beginning of their own
go on with the message above. The app writes its own notices in the phone's language too, so they are told by their form:
a line without a name, a text that is <in angle brackets> or begins with the mark U+200E, a file's name before brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from kestrel.data import chat_log
from kestrel.data.chat_log import Message
from kestrel.data.lines import lines_without_ends
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.errors import KestrelError

COLUMNS: list[set[str]] = []  # lines instead

_MARKS = "[\u200e\u200f\u202a-\u202e]*"
_DATE = r"(\d{1,4})[./-]\s?(\d{1,2})[./-]\s?(\d{1,4})\.?(?:\s[^\W\d]\.)?"  # Bulgarian writes "г." after the year
_CLOCK = r"((?:[^\W\d]{2}\s?)?\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:\s?[ap]\.?\s?m\.?|\s[صم])?)(?:\s[^\W\d]\.)?"
_REST = rf"(?:\]|\s[-\u2013])\s{_MARKS}(.*)"
_DATE_FIRST = re.compile(rf"{_MARKS}\[?{_DATE}[,،]?\s+(?:[^\W\d]+\s?)??{_CLOCK}{_REST}", re.IGNORECASE | re.DOTALL)
_TIME_FIRST = re.compile(rf"{_MARKS}\[?{_CLOCK},?\s+{_DATE}{_REST}", re.IGNORECASE | re.DOTALL)  # Vietnamese
_NAMED = re.compile(r"([^:\n]{1,80}?): ?(.*)", re.DOTALL)
_ORDERS = {"day first": (2, 1, 0), "month first": (2, 0, 1), "year first": (0, 1, 2)}
_AFTERNOON = re.compile(r"p|下午|午後|오후|م", re.IGNORECASE)
_TWELVE_HOURS = re.compile(r"[ap]\.?\s?m|[上下]午|午[前後]|오[전후]|[صم]", re.IGNORECASE)

_MEDIA = re.compile(r"<[^<>\n]+>|null|[^\s:][^\n:]*\.\w{2,5} \([^()\n]+\)")
_FILE = re.compile(r"(?m:^[^\s:][^\n:]{0,200}\.\w{2,5} \([^()\n]{1,60}\)$\n?)|\u200e?<[^<>\n:]+: [^<>\n]+>\n?")
_NOTE = re.compile(r"\s{0,2}\u200e<[^<>\n:]+>|\s<This message was edited>")
_DELETED = re.compile(
    r"(?:This message was deleted|You deleted this message|Diese Nachricht wurde gelöscht|Du hast diese Nachricht gelöscht"
    r"|Se eliminó este mensaje|Eliminaste este mensaje|Ce message a été supprimé|Vous avez supprimé ce message"
    r"|Questo messaggio è stato eliminato|Hai eliminato questo messaggio|Mensagem apagada|Esta mensagem foi apagada"
    r"|Você apagou esta mensagem|Apagou esta mensagem|Dit bericht is verwijderd|U hebt dit bericht verwijderd"
    r"|Данное сообщение удалено|Вы удалили данное сообщение|此消息已删除|你已删除此消息|このメッセージは削除されました)[.。]?"
)  # fmt: skip


class _Entry(NamedTuple):
    date: tuple[int, int, int]
    clock: str
    text: str
    where: str


def matches(start: str) -> bool:
    """Whether a file that starts so is an export: its first line has a time."""
    return _beginning(start.split("\n", 1)[0].replace("\u200f", ""), "") is not None


def read(file: SourceFile) -> Iterator[RawDialogue]:
    order = _order([entry.date for entry in _entries(file)], file)
    return chat_log.dialogues(file, _messages(file, order))


def _messages(file: SourceFile, order: str) -> Iterator[Message]:
    for entry in _entries(file):
        named = _NAMED.fullmatch(entry.text)
        text = named[2].strip() if named else ""
        kept, files = _FILE.subn("", _NOTE.sub("", text).strip())
        if not named:
            file.counts.repair(chat_log.SYSTEM, entry.where)
        elif _DELETED.fullmatch(text.strip("\u200e")):
            file.counts.repair(chat_log.DELETED, entry.where)
        elif not kept.strip() or kept.startswith("\u200e") or _MEDIA.fullmatch(kept):
            file.counts.repair(chat_log.MEDIA, entry.where)
        else:
            file.counts.repair(chat_log.MEDIA, entry.where, files)
            time = datetime(*_date(entry.date, order)).toordinal() * 86400 + _seconds(entry)
            yield Message(time, named[1].strip(), kept.replace("\u200e", ""), entry.where)


def _entries(file: SourceFile) -> Iterator[_Entry]:
    """The messages with all their lines."""
    entry: _Entry | None = None
    for number, line in lines_without_ends(file.path):
        line = line.replace("\u200f", "")  # Arabic and Hebrew dates are full of this mark
        begins = _beginning(line, f"{file.path}:{number}")
        if begins:
            if entry:
                yield entry
            entry = begins
        elif entry:
            entry = entry._replace(text=f"{entry.text}\n{line}")
    if entry:
        yield entry


def _beginning(line: str, where: str) -> _Entry | None:
    """The message that begins with a line, or None where it goes on with another."""
    if found := _DATE_FIRST.fullmatch(line):
        *numbers, clock, text = found.groups()
    elif found := _TIME_FIRST.fullmatch(line):
        clock, *numbers, text = found.groups()
    else:
        return None
    year, month, day = map(int, numbers)  # in the phone's order
    return _Entry((year, month, day), clock, text, where)


def _order(dates: list[tuple[int, int, int]], file: SourceFile) -> str:
    spans: dict[tuple[int, float], str] = {}
    for order in _ORDERS:
        try:
            days = [datetime(*_date(date, order)).toordinal() for date in dates]
        except ValueError:
            continue
        backwards = sum(later < earlier for earlier, later in pairwise(days))
        spans.setdefault((backwards, days[-1] - days[0] if days else 0), order)
    if not spans:
        raise KestrelError(f"{file.path}: the dates have no order of day, month and year that fits all of them.")
    return spans[min(spans)]


def _date(date: tuple[int, int, int], order: str) -> tuple[int, int, int]:
    year, month, day = (date[at] for at in _ORDERS[order])
    return (2000 + year if year < 100 else year), month, day


def _seconds(entry: _Entry) -> int:
    """Since midnight."""
    numbers = [int(number) for number in re.findall(r"\d+", entry.clock)]
    hour, minute, second = (*numbers, 0)[:3]
    if _TWELVE_HOURS.search(entry.clock):
        hour = hour % 12 + 12 * bool(_AFTERNOON.search(entry.clock))
    if hour > 23 or minute > 59 or second > 59:
        raise KestrelError(f"{entry.where}: {entry.clock!r} is no time of day.")
    return (hour * 60 + minute) * 60 + second
