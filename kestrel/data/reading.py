"""One pass over a split of a source: its dialogues on disk, and of each the hashes by which splits are cut."""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kestrel.data.cores import in_order
from kestrel.data.corpus import Corpus
from kestrel.data.repair import Draft, Utterance, finish, persona_key, stable_hash
from kestrel.data.spool import Spool, counted_before, counted_of, record_of, tally_of
from kestrel.data.tally import Tally
from kestrel.dialogue import Dialogue
from kestrel.errors import KestrelError

NO_PERSONA = 0
_DRAFTS_A_PIECE = 250
_NOTHING = Tally()

# What the reader counted before a draft (None: nothing), and the draft (None: no more came).
Piece = list[tuple[Tally | None, Draft | None]]


class Finished(NamedTuple):
    """The dialogues of a piece.

    Attributes:
        records: of the spool, joined.
        sizes: bytes of each.
        keys: four hashes of each, as `Reading` has them.
        rest: what was counted after the last of them.
    """

    records: bytes
    sizes: list[int]
    keys: array[int]
    rest: Tally


class Reading:
    """A split of a source, read once.

    Args:
        corpus: the source.
        split: one of `corpus.splits`.
        seed: of the ranks.
        folder: on whose disk the dialogues are kept; None: the system's for temporary files.
        processes: how many repair what one reads.

    Attributes:
        spool: the dialogues.
        conversations, owners, partners, ranks: hashes of each, uint64 of shape (dialogues,). Where the owner's persona
            is not told (ParlAI's none and other), the conversation stands for it. Ranks are of the dialogue_id.
        rest: what was counted after the last dialogue.

    Raises:
        KestrelError: as `Corpus.read`.
    """

    def __init__(self, corpus: Corpus, split: str, seed: int, folder: Path | None, processes: int = 1):
        self.spool = Spool(folder)
        self.rest = Tally()
        self._keys = array("Q")
        pieces = _Pieces(corpus, split)
        if processes == 1:
            finished = in_order(partial(_finish, seed=seed), pieces, 1)
        else:
            finished = in_order(lambda packed: _finish(_unpacked(packed), seed), map(_packed, pieces), processes)
        with tqdm(desc=f"reading {split}", unit=" dialogues", disable=None, leave=False) as bar:
            for each in finished:
                self._add(each)
                bar.update(len(each.sizes))
        columns = np.frombuffer(self._keys, dtype=np.uint64).reshape(-1, 4)
        self.conversations, self.owners, self.partners, self.ranks = columns.T
        corpus.refuse_repeated_ids(split, self.ranks)  # it stands before what else is wrong
        if pieces.error is not None:
            raise pieces.error
        if not len(self.spool):
            corpus.refuse_nothing(split, self.rest.dropped)

    def _add(self, finished: Finished) -> None:
        records, sizes = finished.records, finished.sizes
        if not sizes:
            self.rest.absorb(finished.rest)
            return
        if self.rest != _NOTHING:
            records, sizes = counted_before(records, sizes, self.rest)
        self.spool.add(records, sizes)
        self._keys.extend(finished.keys)
        self.rest = finished.rest


class _Pieces:
    """Pieces of a split, as the reader of its format finds it.

    Attributes:
        error: what was wrong with the source, where the reader stopped.
    """

    def __init__(self, corpus: Corpus, split: str):
        self._corpus, self._split = corpus, split
        self.error: KestrelError | None = None

    def __iter__(self) -> Iterator[Piece]:
        piece: Piece = []
        tally = Tally()
        try:
            for draft in self._corpus.drafts(self._split, tally):
                counted = None
                if tally != _NOTHING:
                    counted = Tally()
                    counted.absorb(tally)
                    tally.clear()
                piece.append((counted, draft))
                if len(piece) == _DRAFTS_A_PIECE:
                    yield piece
                    piece = []
        except KestrelError as error:
            self.error = error
        yield [*piece, (tally, None)]


def _finish(piece: Piece, seed: int) -> Finished:
    """Repairs drafts and takes their hashes."""
    records: list[bytes] = []
    keys = array("Q")
    since = Tally()
    for counted, draft in piece:
        if counted is not None:
            since.absorb(counted)
        dialogue = None if draft is None else finish(draft, since)
        if dialogue is None:
            continue
        since.kept += 1
        keys.extend(_keys(dialogue, seed))
        records.append(record_of(dialogue, since))
        since.clear()
    return Finished(b"".join(records), list(map(len, records)), keys, since)


def _keys(dialogue: Dialogue, seed: int) -> tuple[int, int, int, int]:
    conversation = stable_hash(dialogue.conversation_id)
    owner = persona_key(dialogue.persona) if dialogue.persona else conversation
    partner = persona_key(dialogue.partner_persona) if dialogue.partner_persona else NO_PERSONA
    return conversation, owner, partner, stable_hash(str(seed), "dialogue", dialogue.dialogue_id)


# Between processes a piece is bytes: made and read by marshal in a quarter of the time that pickle takes.


def _packed(piece: Piece) -> bytes:
    return marshal.dumps(
        [
            (
                None if tally is None else counted_of(tally),
                None
                if draft is None
                else (
                    draft.where,
                    draft.dialogue_id,
                    draft.persona,
                    [tuple(turn) for turn in draft.turns],
                    draft.conversation_id,
                    draft.partner_persona,
                    draft.personas_expected,
                ),
            )
            for tally, draft in piece
        ]
    )


def _unpacked(packed: bytes) -> Piece:
    piece: Piece = []
    for counted, fields in marshal.loads(packed):
        draft = None
        if fields is not None:
            where, identity, persona, turns, *others = fields
            draft = Draft(where, identity, persona, tuple([Utterance(*turn) for turn in turns]), *others)
        piece.append((None if counted is None else tally_of(counted), draft))
    return piece
