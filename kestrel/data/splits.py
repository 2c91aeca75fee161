"""Train, validation and test: the source's own where it has them, otherwise cut by persona and conversation.

The literature's splits are kept as they are. Where a source has train and validation only (ConvAI2, whose test set is
hidden), its validation set is our test set, because published numbers are on it, and our validation set is cut from its
train set. Where it has train only, both are cut from it.

A cut takes personas, not dialogues. A persona whose owner's replies are validated or tested on is not in train, neither
as an owner's nor as a partner's, and the dialogues of one conversation are all in one split.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kestrel.data.corpus import Corpus
from kestrel.data.read_counts import ReadCounts, reasons
from kestrel.data.reading import Reading, require_unique_ids
from kestrel.data.repair import stable_hash
from kestrel.dialogue import SPLITS, Dialogue
from kestrel.errors import KestrelError

MIXED = "owner's persona is of another split than the conversation"
PARTNER_HELD = "partner's persona is held out for validation or test"
TOO_MANY = "more than max_dialogues"

_REASONS = (None, MIXED, PARTNER_HELD, TOO_MANY)


class Splitter:
    """Streams the dialogues of each split. Deterministic across processes and Python versions.

    The constructor reads the corpus, once, into a file without a name; some 70 bytes a dialogue are in memory.

    Args:
        validation_fraction: share of train's personas that make the validation set, where the source has none; 0: no
            validation set.
        test_fraction: the same for the test set.
        seed: of the choice of personas, and of dialogues where `max_dialogues` chooses.
        max_dialogues: keep at most so many dialogues of each split, chosen at random; None: all.
        folder: on whose disk that file is; None: the system's folder for temporary files.

    Attributes:
        splits: those that can be read, among train, validation, test, in this order.
        origin: split -> where it comes from: a split of the source, or "cut from train".
        persona_overlap: for each split taken from the source as it is: how many personas its owners have ("personas")
            and how many of them are in the source's train split too, as an owner's or a partner's ("in_train").

    Raises:
        KestrelError: malformed data, the same dialogue_id in two splits, or too few personas to cut.
    """

    def __init__(
        self,
        corpus: Corpus,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        max_dialogues: int | None = None,
        folder: Path | None = None,
    ):
        self.corpus = corpus
        self.seed = seed
        source_split = {split: split for split in corpus.splits}
        if corpus.splits == ("train", "validation"):
            source_split = {"train": "train", "test": "validation"}
        shares = {"test": test_fraction, "validation": validation_fraction}
        self._fractions = {split: share for split, share in shares.items() if share > 0 and split not in source_split}
        self._source_split = source_split | {split: "train" for split in self._fractions}
        self.splits = tuple(split for split in SPLITS if split in self._source_split)
        self.origin = {
            split: "cut from train" if split in self._fractions else self._source_split[split] for split in self.splits
        }

        self._readings = {split: Reading(corpus, split, seed, folder) for split in corpus.splits}
        require_unique_ids(self._readings.values())
        # Of each dialogue of a split of the source: its split, as an index of SPLITS, and why it is left out of that
        # split, as an index of _REASONS.
        self._assigned: dict[str, np.ndarray] = {}
        self._reasons: dict[str, np.ndarray] = {}
        for split, name in source_split.items():
            count = len(self._readings[name].ranks)
            self._assigned[name] = np.full(count, SPLITS.index(split), np.uint8)
            self._reasons[name] = np.zeros(count, np.uint8)
        self._cut(self._readings["train"])
        self.persona_overlap = self._overlap()
        if max_dialogues is not None:
            self._limit(max_dialogues)

    def read(self, split: str, counts: ReadCounts) -> Iterator[Dialogue]:
        """Streams the dialogues of a split, in the order of the source.

        The counts of the splits cut from one split of the source add up to the counts of that split: a dialogue that the
        reader drops counts for the split of the dialogue that follows it.

        Raises:
            KestrelError: no dialogue is left.
        """
        name = self._source_split[split]
        chosen = np.flatnonzero(self._assigned[name] == SPLITS.index(split))
        why = self._reasons[name][chosen]
        for index, (dialogue, since_last, where) in zip(why, self._readings[name].dialogues(chosen), strict=True):
            reason = _REASONS[index]
            if reason is not None:
                since_last.kept -= 1
                since_last.drop(reason, where)
            counts.add(since_last)
            if reason is None:
                yield dialogue
        if self.origin[split] == name:
            counts.add(self._readings[name].rest)
        if why.all():
            raise KestrelError(
                f"{self.corpus.source}: no dialogue is left for the {split} split ({reasons(counts.dropped)})."
            )

    def _cut(self, train: Reading) -> None:
        personas, persona_of = _indexed(train.owners)
        conversations, conversation_of = _indexed(train.conversations)
        # The split that each persona and each conversation is held out for; 0, as in SPLITS, is train.
        held_persona, held_conversation = np.zeros(len(personas), np.uint8), np.zeros(len(conversations), np.uint8)
        for split, fraction in self._fractions.items():
            free = np.unique(persona_of[(held_persona[persona_of] == 0) & (held_conversation[conversation_of] == 0)])
            hashes = (stable_hash(str(self.seed), str(persona)) for persona in personas[free])
            ranked = free[np.argsort(np.fromiter(hashes, np.uint64, len(free)), kind="stable")]
            chosen = ranked[: max(1, round(fraction * len(personas)))]
            if len(chosen) == len(ranked):
                raise KestrelError(
                    f"{self.corpus.source}: too few personas ({len(personas)}) to cut a {split} split that shares "
                    "none with train. Bring more data, or set that split's fraction to 0."
                )
            held_persona[chosen] = SPLITS.index(split)
            taken = np.unique(conversation_of[held_persona[persona_of] == SPLITS.index(split)])
            held_conversation[taken[held_conversation[taken] == 0]] = SPLITS.index(split)
        assigned = held_conversation[conversation_of]
        mixed = (assigned != 0) & (held_persona[persona_of] != assigned)
        partner_held = (assigned == 0) & np.isin(train.partners, personas[held_persona != 0])
        self._assigned["train"] = assigned
        self._reasons["train"][mixed] = _REASONS.index(MIXED)
        self._reasons["train"][partner_held] = _REASONS.index(PARTNER_HELD)

    def _overlap(self) -> dict[str, dict[str, int]]:
        overlap: dict[str, dict[str, int]] = {}
        train = self._readings["train"]
        for split in self.splits:
            if self._source_split[split] != "train":
                personas = np.unique(self._readings[self._source_split[split]].owners)
                in_train = np.isin(personas, train.owners) | np.isin(personas, train.partners)
                overlap[split] = {"personas": len(personas), "in_train": int(in_train.sum())}
        return overlap

    def _limit(self, limit: int) -> None:
        for split in self.splits:
            name = self._source_split[split]
            ranks, why = self._readings[name].ranks, self._reasons[name]
            left = (self._assigned[name] == SPLITS.index(split)) & (why == 0)
            if left.sum() > limit:
                last = np.partition(ranks[left], limit - 1)[limit - 1]
                why[left & (ranks > last)] = _REASONS.index(TOO_MANY)


def _indexed(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct hashes, ascending, and the index of each hash among them (4 bytes, half of what numpy takes)."""
    distinct, index = np.unique(hashes, return_inverse=True)
    return distinct, index.astype(np.uint32)
