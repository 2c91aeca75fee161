"""One pass over a split of a source: its dialogues go to disk; what the splits are cut by stays in memory."""

from __future__ import annotations

import pickle  # noqa: TID251  of dialogues in a file without a name
import tempfile
from array import array
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kestrel.data.corpus import Corpus
from kestrel.data.read_counts import ReadCounts, reasons
from kestrel.data.repair import NO_PERSONA_GIVEN, persona_key, repair, stable_hash
from kestrel.dialogue import Dialogue
from kestrel.errors import KestrelError

NO_PERSONA = 0


class Reading:
    """A split of a source, read once, however many splits are cut from it.

    The dialogues are in a file without a name, so that nothing of it is left behind however the process ends. In memory
    are 44 bytes for each.

    Args:
        seed: of the ranks.
        folder: on whose disk the file is; None: the system's folder for temporary files.

    Attributes:
        conversations, owners, partners, ranks: hashes of each dialogue, uint64 of shape (dialogues,). Where the source
            does not name the owner's persona (ParlAI's none and other), the owner's hash is the conversation's. Ranks
            are hashes of the dialogue_id.
        rest: what was counted after the last dialogue.

    Raises:
        KestrelError: malformed input, or no dialogue that could be kept.
    """

    def __init__(self, corpus: Corpus, split: str, seed: int = 0, folder: Path | None = None):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open as long as this object exists
        self._ends = array("Q", [0])
        self.rest = ReadCounts()
        keys = array("Q")
        with tqdm(desc=f"reading {split}", unit=" dialogues", disable=None, leave=False) as bar:
            for raw in corpus.raw_dialogues(split, self.rest):
                dialogue = repair(raw, self.rest, corpus.settings)
                if dialogue is not None:
                    keys.extend(_keys(dialogue, seed))
                    record = pickle.dumps((dialogue, self.rest, raw.where), pickle.HIGHEST_PROTOCOL)
                    self._ends.append(self._ends[-1] + self._file.write(record))
                    self.rest.clear()
                    bar.update()
        if not keys:
            why = reasons(self.rest.dropped) or "it has none"
            if NO_PERSONA_GIVEN in self.rest.dropped:
                why += "; data.persona can give one"
            raise KestrelError(f"{corpus.source}: the {split} split yields no dialogue ({why}).")
        self.conversations, self.owners, self.partners, self.ranks = np.frombuffer(keys, np.uint64).reshape(-1, 4).T

    def dialogues(self, chosen: Iterable[int] | None = None) -> Iterator[tuple[Dialogue, ReadCounts, str]]:
        """Dialogues, each with what was counted since the dialogue before it in the source, and its place there.

        Args:
            chosen: indices in the order of the source; None: all.
        """
        for index in range(len(self.ranks)) if chosen is None else chosen:
            start, end = self._ends[index], self._ends[index + 1]
            self._file.seek(start)
            yield pickle.loads(self._file.read(end - start))  # noqa: S301


def require_unique_ids(readings: Collection[Reading]) -> None:
    """Looks for two equal hashes: sorted, not as a set, which takes ten times the memory.

    Raises:
        KestrelError: a dialogue_id occurs twice; names both places.
    """
    ranks = np.concatenate([reading.ranks for reading in readings])
    order = np.argsort(ranks, kind="stable")
    repeated = order[1:][ranks[order[1:]] == ranks[order[:-1]]]
    if len(repeated):
        second = repeated.min()
        first = np.flatnonzero(ranks == ranks[second])[0]
        records = (record for reading in readings for record in reading.dialogues())
        (_, _, there), (dialogue, _, here) = (record for at, record in enumerate(records) if at in (first, second))
        raise KestrelError(
            f"{here}: the dialogue_id {dialogue.dialogue_id!r} is used at {there} already; make it unique."
        )


def _keys(dialogue: Dialogue, seed: int) -> tuple[int, int, int, int]:
    conversation = stable_hash(dialogue.conversation_id)
    owner = persona_key(dialogue.persona) if dialogue.persona else conversation
    partner = persona_key(dialogue.partner_persona) if dialogue.partner_persona else NO_PERSONA
    return conversation, owner, partner, stable_hash(str(seed), "dialogue", dialogue.dialogue_id)
