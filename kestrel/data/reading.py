"""One pass over a split of a source: its dialogues go to disk; what the splits are cut by stays in memory."""

from __future__ import annotations

import marshal
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kestrel.data.corpus import Corpus
from kestrel.data.read_counts import ReadCounts
from kestrel.data.repair import persona_key, repair, stable_hash
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError

NO_PERSONA = 0


class Reading:
    """A split of a source, read once, however many splits are cut from it.

    The dialogues are in a file without a name, so that nothing of it is left behind however the process ends. In memory
    are 44 bytes for each.

    Args:
        corpus: the source.
        split: one of `corpus.splits`.
        seed: of the ranks.
        folder: on whose disk the file is; None: the system's folder for temporary files.

    Attributes:
        conversations, owners, partners, ranks: hashes of each dialogue, uint64 of shape (dialogues,). Where the source
            does not name the owner's persona (ParlAI's none and other), the owner's hash is the conversation's. Ranks
            are hashes of the dialogue_id.
        rest: what was counted after the last dialogue.

    Raises:
        KestrelError: malformed input, no dialogue that could be kept, or a dialogue_id that occurs twice.
    """

    def __init__(self, corpus: Corpus, split: str, seed: int = 0, folder: Path | None = None):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open as long as this object exists
        self._ends = array("Q", [0])
        self.rest = ReadCounts()
        keys = array("Q")
        failure: KestrelError | None = None
        with tqdm(desc=f"reading {split}", unit=" dialogues", disable=None, leave=False) as bar:
            try:
                for raw in corpus.raw_dialogues(split, self.rest):
                    dialogue = repair(raw, self.rest)
                    if dialogue is not None:
                        keys.extend(_keys(dialogue, seed))
                        self._add(dialogue)
                        bar.update()
            except KestrelError as error:
                failure = error
        self.conversations, self.owners, self.partners, self.ranks = np.frombuffer(keys, np.uint64).reshape(-1, 4).T
        corpus.require_unique_ids(split, self.ranks)  # a repeated id comes before what stopped the reader
        if failure is not None:
            raise failure
        if not len(self.ranks):
            why = self.rest.why_dropped() or "it has none"
            raise KestrelError(f"{corpus.source}: the {split} split yields no dialogue ({why}).")

    def dialogues(self, chosen: Iterable[int] | None = None) -> Iterator[tuple[Dialogue, ReadCounts]]:
        """Dialogues, each with what was counted since the dialogue before it in the source.

        Args:
            chosen: indices in the order of the source; None: all.
        """
        for index in range(len(self.ranks)) if chosen is None else chosen:
            start, end = self._ends[index], self._ends[index + 1]
            self._file.seek(start)
            yield _unpacked(self._file.read(end - start))

    def _add(self, dialogue: Dialogue) -> None:
        self._ends.append(self._ends[-1] + self._file.write(_packed(dialogue, self.rest)))
        self.rest.clear()


def _keys(dialogue: Dialogue, seed: int) -> tuple[int, int, int, int]:
    conversation = stable_hash(dialogue.conversation_id)
    owner = persona_key(dialogue.persona) if dialogue.persona else conversation
    partner = persona_key(dialogue.partner_persona) if dialogue.partner_persona else NO_PERSONA
    return conversation, owner, partner, stable_hash(str(seed), "dialogue", dialogue.dialogue_id)


# marshal takes a quarter of pickle's time, and plain types only.


def _packed(dialogue: Dialogue, counted: ReadCounts) -> bytes:
    turns = [tuple(turn) for turn in dialogue.turns]
    ids = (dialogue.dialogue_id, dialogue.conversation_id)
    fields = (*ids, dialogue.persona, dialogue.partner_persona, turns, dialogue.candidates)
    counts = (counted.read, counted.kept, dict(counted.dropped), dict(counted.repaired), counted.examples)
    return marshal.dumps((fields, counts))


def _unpacked(record: bytes) -> tuple[Dialogue, ReadCounts]:
    fields, (read, kept, dropped, repaired, examples) = marshal.loads(record)
    dialogue_id, conversation_id, persona, partner_persona, turns, candidates = fields
    turns = tuple([Turn(*turn) for turn in turns])
    dialogue = Dialogue(dialogue_id, persona, turns, conversation_id, partner_persona, candidates)
    return dialogue, ReadCounts(read, kept, Counter(dropped), Counter(repaired), examples)
