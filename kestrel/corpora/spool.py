"""Dialogues of one reading, kept on disk, so that a source is parsed once however many splits are cut from it."""

from __future__ import annotations

import marshal
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kestrel.corpora.tally import Tally
from kestrel.dialogue import Dialogue, Speaker, Turn

_IN_MEMORY = 4 * 2**20  # bytes; a small source needs no file
_SPEAKERS: tuple[Speaker, Speaker] = ("partner", "self")


class Spool:
    """Dialogues in a file that has no name, so that nothing of it is left behind however the process ends.

    4 bytes a dialogue are held in memory.

    Args:
        folder: on whose disk the file lies; None: the system's for temporary files.
    """

    def __init__(self, folder: Path | None = None):
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(folder) if folder else None)  # noqa: SIM115  lives as long as this
        self._sizes = array("I")

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, dialogue: Dialogue, since: Tally) -> None:
        """Appends a dialogue, and what was counted since the one before."""
        plain = since.read == since.kept == 1 and not since.dropped and not since.repaired
        record = marshal.dumps(
            (
                dialogue.dialogue_id,
                dialogue.conversation_id,
                dialogue.persona,
                dialogue.partner_persona,
                _SPEAKERS.index(dialogue.turns[0].speaker),  # they take turns
                [turn.text for turn in dialogue.turns],
                dialogue.candidates,
                None
                if plain
                else (since.read, since.kept, dict(since.dropped), dict(since.repaired), dict(since.examples)),
            )
        )
        self._file.write(record)
        self._sizes.append(len(record))

    def read(self, chosen: np.ndarray) -> Iterator[tuple[Dialogue, Tally]]:
        """Dialogues by their places in the order of adding, and what was counted before each.

        Args:
            chosen: ascending places, integers of shape (n,).
        """
        sizes = np.frombuffer(self._sizes, dtype=np.uint32)
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        for start, size in zip(starts[chosen], sizes[chosen], strict=True):
            self._file.seek(int(start))
            identity, conversation, persona, partner_persona, first, texts, candidates, counted = marshal.loads(
                self._file.read(int(size))
            )
            yield (
                Dialogue(
                    identity,
                    persona,
                    tuple([Turn(_SPEAKERS[(first + at) % 2], text) for at, text in enumerate(texts)]),
                    conversation,
                    partner_persona,
                    candidates,
                ),
                _tally(*counted) if counted else Tally(1, 1),
            )


def _tally(
    read: int, kept: int, dropped: dict[str, int], repaired: dict[str, int], examples: dict[str, list[str]]
) -> Tally:
    return Tally(read, kept, Counter(dropped), Counter(repaired), examples)
