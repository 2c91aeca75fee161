"""Every published form of Persona-Chat, and Kestrel's own, as a stream of dialogues.

    from kestrel.data.splits import Splitter

    corpus = open_corpus("train_self_original.txt")
    splitter = Splitter(corpus)
    tally = Tally()
    for dialogue in splitter.read("train", tally): ...
    print(tally.table())

One file a format reads drafts; `repair.finish` is the gate that every draft passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np

from kestrel.data.formats.recognize import FORMATS, READERS, resolve
from kestrel.data.locate import Part, locate
from kestrel.data.repair import Draft, finish
from kestrel.data.tally import Tally
from kestrel.errors import KestrelError

__all__ = ["FORMATS", "Corpus", "Tally", "open_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Dialogues of one source.

    Attributes:
        source: as given.
        format: one of `FORMATS`.
        files: the local files it is read from (for a hub set: in the Hub's cache).
        fingerprint: file name -> sha256; for a hub set also "hub id" and "hub revision" (the commit).
        splits: the splits that the source has, among train, validation, test, in this order; always with train.
        both_sides: whether a conversation whose both personas are known yields a dialogue for each owner.
    """

    source: str
    format: str
    files: list[Path]
    fingerprint: dict[str, str]
    splits: tuple[str, ...]
    both_sides: bool
    parts: dict[str, list[Part]]

    def place(self, split: str, dialogue_id: str) -> str:
        """Where the source first has a dialogue (file and line or row). Reads the split again: for messages only."""
        return next(draft.where for draft in self.drafts(split, Tally()) if draft.dialogue_id == dialogue_id)

    def drafts(self, split: str, tally: Tally) -> Iterator[Draft]:
        """What the reader of the format finds, before repair."""
        parts = self.parts[split]
        for number, part in enumerate(parts):
            prefix = split if len(parts) == 1 else f"{split}.{number}"
            yield from READERS[self.format](part.path, part.section, prefix, self.both_sides, tally)

    def refuse_repeated_ids(self, split: str, ids: np.ndarray) -> None:
        """Looks for two equal hashes: sorted, not as a set, which takes ten times the memory.

        Args:
            split: one of `splits`.
            ids: hashes of the ids of its dialogues that were kept, in their order, uint64 of shape (dialogues,).

        Raises:
            KestrelError: a dialogue_id stands twice; naming both places, for which the split is read again.
        """
        ordered = np.sort(ids)
        if (ordered[1:] == ordered[:-1]).any():
            order = np.argsort(ids, kind="stable")
            again = order[1:][ids[order[1:]] == ids[order[:-1]]]
            kept = (draft for draft in self.drafts(split, Tally()) if finish(draft, Tally()) is not None)
            draft = next(islice(kept, int(again.min()), None))
            raise KestrelError(
                f"{draft.where}: the dialogue_id {draft.dialogue_id!r} stands at "
                f"{self.place(split, draft.dialogue_id)} already; make it unique."
            )

    def refuse_nothing(self, split: str, dropped: Counter[str]) -> NoReturn:
        """Says why no dialogue of a split was kept.

        Raises:
            KestrelError: always.
        """
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in dropped.most_common())
        raise KestrelError(f"{self.source}: the {split} split yields no dialogue ({reasons or 'it has none'}).")


def open_corpus(source: str, format: str = "auto", *, revision: str | None = None, both_sides: bool = True) -> Corpus:
    """Finds and recognizes a source; reads no more of it than that takes, and its sha256.

    Args:
        source: a file, a folder with a file for each split, or a hub id `owner/name`.
        format: one of `FORMATS`, or "auto" to tell by the content.
        revision: branch, tag or commit of a hub set.
        both_sides: see `Corpus`.
    Raises:
        KestrelError: no such source, not reachable, of no known format, or not of the one named.
    """
    located = locate(source, revision)
    formats = {
        part.path: resolve(part.path, part.section, format) for parts in located.parts.values() for part in parts
    }
    if len(set(formats.values())) > 1:
        told = ", ".join(f"{path.name} is {name}" for path, name in formats.items())
        raise KestrelError(f"{source}: the files are of different formats: {told}.")
    return Corpus(
        source=source,
        format=next(iter(formats.values())),
        files=located.files,
        fingerprint=located.fingerprint(),
        splits=tuple(located.parts),
        both_sides=both_sides,
        parts=located.parts,
    )
