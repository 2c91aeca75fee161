"""Dialogues of one reading, kept on disk, so that a source is parsed once however many splits are cut from it."""

from __future__ import annotations

import marshal
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.data.tally import Tally
from kestrel.dialogue import Dialogue, Speaker, Turn

_IN_MEMORY = 4 * 2**20  # bytes; a small source needs no file
_SPEAKERS: tuple[Speaker, Speaker] = ("partner", "self")

Counted = tuple[int, int, dict[str, int], dict[str, int], dict[str, list[str]]]


class Spool:
    """Records of dialogues in a file that has no name, so that nothing of it is left behind however the process ends.

    4 bytes a dialogue are held in memory.

    Args:
        folder: on whose disk the file lies; None: the system's for temporary files.
    """

    def __init__(self, folder: Path | None = None):
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder) if folder else None)  # noqa: SIM115  lives as long as this
        self._sizes = array("I")

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, records: bytes, sizes: Iterable[int]) -> None:
        """Appends records, joined, and the bytes that each has."""
        self._file.write(records)
        self._sizes.extend(sizes)

    def read(self, chosen: np.ndarray, at_once: int) -> Iterator[tuple[bytes, list[int]]]:
        """Records by their places in the order of adding: joined, so many at once, and the bytes that each has.

        Args:
            chosen: ascending places, integers of shape (n,).
            at_once: the most that are read together.
        """
        sizes = np.frombuffer(self._sizes, dtype=np.uint32)
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        for begin in range(0, len(chosen), at_once):
            places = chosen[begin : begin + at_once]
            joined = []
            # Neighbours in one go: most of a source goes to one split.
            for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
                self._file.seek(int(starts[run[0]]))
                joined.append(self._file.read(int(sizes[run].sum(dtype=np.int64))))
            yield b"".join(joined), sizes[places].tolist()


def record_of(dialogue: Dialogue, since: Tally) -> bytes:
    """A dialogue, and what was counted since the one before."""
    return _record(
        (
            dialogue.dialogue_id,
            dialogue.conversation_id,
            dialogue.persona,
            dialogue.partner_persona,
            _SPEAKERS.index(dialogue.turns[0].speaker),  # they take turns
            [turn.text for turn in dialogue.turns],
            dialogue.candidates,
        ),
        since,
    )


def dialogues_of(records: bytes, sizes: Iterable[int]) -> Iterator[tuple[Dialogue, Tally]]:
    """The dialogues of joined records, and what was counted before each."""
    for record in _parts(records, sizes):
        (identity, conversation, persona, partner_persona, first, texts, candidates), counted = marshal.loads(record)
        turns = tuple([Turn(_SPEAKERS[(first + at) % 2], text) for at, text in enumerate(texts)])
        yield Dialogue(identity, persona, turns, conversation, partner_persona, candidates), tally_of(counted)


def counted_before(records: bytes, sizes: Sequence[int], before: Tally) -> tuple[bytes, list[int]]:
    """The same records, the first of which tells also of what was counted before it."""
    fields, counted = marshal.loads(records)
    before.absorb(tally_of(counted))
    first = _record(fields, before)
    return first + records[sizes[0] :], [len(first), *sizes[1:]]


def counted_of(tally: Tally) -> Counted | None:
    """A tally in plain types; None for one dialogue that was read and kept."""
    if tally.read == tally.kept == 1 and not tally.dropped and not tally.repaired:
        return None
    return tally.read, tally.kept, dict(tally.dropped), dict(tally.repaired), dict(tally.examples)


def tally_of(counted: Counted | None) -> Tally:
    """The tally that was told in plain types."""
    if counted is None:
        return Tally(1, 1)
    read, kept, dropped, repaired, examples = counted
    return Tally(read, kept, Counter(dropped), Counter(repaired), examples)


def _record(fields: tuple[Any, ...], since: Tally) -> bytes:
    return marshal.dumps((fields, counted_of(since)))


def _parts(joined: bytes, sizes: Iterable[int]) -> Iterator[memoryview]:
    view, start = memoryview(joined), 0
    for size in sizes:
        yield view[start : start + size]
        start += size
