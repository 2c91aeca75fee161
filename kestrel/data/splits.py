"""Train, validation and test: the source's own where it has them, cut by persona and conversation where it has not.

The literature's splits are kept as they are. Where a source has train and validation only (ConvAI2, whose test set is
hidden), its validation set is our test set, because that is what published numbers are on, and our validation set is cut
from its train set. Where it has train only, both are cut from it.

A cut takes personas, not dialogues. No persona whose owner's replies are validated or tested on stands in train, neither
as an owner's nor as a partner's, and no conversation straddles splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kestrel.data.corpus import Corpus
from kestrel.data.reading import Reading
from kestrel.data.repair import stable_hash
from kestrel.data.tally import Tally
from kestrel.dialogue import Dialogue
from kestrel.errors import KestrelError

MIXED = "owner's persona is of another split than the conversation"
PARTNER_HELD = "partner's persona is held out for validation or test"
TOO_MANY = "more than max_dialogues"

_SPLITS = ("train", "validation", "test")
_REASONS = (None, MIXED, PARTNER_HELD, TOO_MANY)


class Splitter:
    """Streams the dialogues of each split. Deterministic across processes and Python versions.

    Making one reads the corpus, once, into a file without a name. In memory it holds some 70 bytes a dialogue
    meanwhile, 6 afterwards, and 30 while a split is read.

    Args:
        corpus: what to split.
        validation_fraction: share of train's personas that make the validation set, where the source has none to give;
            0: no validation set.
        test_fraction: the same for the test set.
        seed: of the choice of personas, and of dialogues where `max_dialogues` chooses.
        max_dialogues: keep so many dialogues of each split at most, chosen at random; None: all.
        folder: on whose disk that file lies; None: the system's for temporary files.

    Attributes:
        splits: those that can be read, among train, validation, test, in this order.
        origin: split -> where it comes from: a split of the source, or "cut from train".
        persona_overlap: for each split taken over from the source: how many personas its owners have ("personas") and
            how many of them stand in the source's train split too, in any role ("in_train").

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
        if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
            raise KestrelError("the fractions for validation and test must be 0 or more, and less than 1 together.")
        if max_dialogues is not None and max_dialogues < 1:
            raise KestrelError(f"max_dialogues must be at least 1, found {max_dialogues}.")
        self.corpus = corpus
        self.seed = seed
        native = {"train": "train"} | {split: split for split in corpus.splits}
        if corpus.splits == ("train", "validation"):
            native = {"train": "train", "test": "validation"}
        fractions = {"test": test_fraction, "validation": validation_fraction}
        self._fractions = {split: share for split, share in fractions.items() if share > 0 and split not in native}
        self._native = native | {split: "train" for split in self._fractions}
        self.splits = tuple(split for split in _SPLITS if split in self._native)
        self.origin = {
            split: "cut from train" if split in self._fractions else self._native[split] for split in self.splits
        }

        self._read = read = {
            split: Reading(corpus, split, seed, folder) for split in dict.fromkeys(self._native.values())
        }
        self._refuse_shared_ids(read)
        # Of each dialogue: the split that it goes to, and why it is left out of that, if so; indices of the tuples.
        self._place: dict[str, np.ndarray] = {}
        self._reason: dict[str, np.ndarray] = {}
        for split, taken_over in self._native.items():
            if taken_over != "train":
                count = len(read[taken_over].ranks)
                self._place[taken_over] = np.full(count, _SPLITS.index(split), np.uint8)
                self._reason[taken_over] = np.zeros(count, np.uint8)
        self._cut(read["train"])
        self.persona_overlap = self._overlap(read)
        if max_dialogues is not None:
            self._limit(read, max_dialogues)

    def read(self, split: str, tally: Tally) -> Iterator[Dialogue]:
        """Streams the dialogues of a split, in the order of the source.

        The tallies of the splits cut from one split of the source add up to the tally of that split: a dialogue that the
        reader drops counts for the split of the dialogue that follows it.

        Raises:
            KestrelError: no such split, or no dialogue left.
        """
        if split not in self.splits:
            raise KestrelError(
                f"there is no {split} split of {self.corpus.source}; there are {', '.join(self.splits)}."
            )
        native = self._native[split]
        chosen = np.flatnonzero(self._place[native] == _SPLITS.index(split))
        reasons = self._reason[native][chosen]
        for number, (dialogue, counted) in zip(reasons, self._read[native].dialogues(chosen), strict=True):
            reason = _REASONS[number]
            if reason is not None:
                counted.kept -= 1
                counted.drop(reason, f"dialogue {dialogue.dialogue_id}")
            tally.absorb(counted)
            if reason is None:
                yield dialogue
        if self.origin[split] == native:
            tally.absorb(self._read[native].rest)
        if reasons.all():
            why = "; ".join(f"{count:,}: {reason}" for reason, count in tally.dropped.most_common())
            raise KestrelError(f"{self.corpus.source}: no dialogue is left for the {split} split ({why}).")

    def _cut(self, train: Reading) -> None:
        personas, persona_of = _numbered(train.owners)
        conversations, conversation_of = _numbered(train.conversations)
        # The split that each persona and each conversation is held for; 0, as _SPLITS has it, is train.
        held_persona, held_conversation = np.zeros(len(personas), np.uint8), np.zeros(len(conversations), np.uint8)
        for split, fraction in self._fractions.items():
            free = np.unique(persona_of[(held_persona[persona_of] == 0) & (held_conversation[conversation_of] == 0)])
            keys = (stable_hash(str(self.seed), str(persona)) for persona in personas[free])
            ranked = free[np.argsort(np.fromiter(keys, np.uint64, len(free)), kind="stable")]
            chosen = ranked[: max(1, round(fraction * len(personas)))]
            if len(chosen) == len(ranked):
                raise KestrelError(
                    f"{self.corpus.source}: too few personas ({len(personas)}) to cut a {split} split that shares "
                    "none with train. Bring more data, or set that split's fraction to 0."
                )
            held_persona[chosen] = _SPLITS.index(split)
            taken = np.unique(conversation_of[held_persona[persona_of] == _SPLITS.index(split)])
            held_conversation[taken[held_conversation[taken] == 0]] = _SPLITS.index(split)
        place = held_conversation[conversation_of]
        mixed = (place != 0) & (held_persona[persona_of] != place)
        partner_held = (place == 0) & np.isin(train.partners, personas[held_persona != 0])
        self._place["train"] = place
        self._reason["train"] = np.select(
            [mixed, partner_held],
            [np.uint8(_REASONS.index(MIXED)), np.uint8(_REASONS.index(PARTNER_HELD))],
            np.uint8(0),
        )

    def _overlap(self, read: dict[str, Reading]) -> dict[str, dict[str, int]]:
        overlap: dict[str, dict[str, int]] = {}
        for split in self.splits:
            if self._native[split] != "train":
                personas = np.unique(read[self._native[split]].owners)
                in_train = np.isin(personas, read["train"].owners) | np.isin(personas, read["train"].partners)
                overlap[split] = {"personas": len(personas), "in_train": int(in_train.sum())}
        return overlap

    def _limit(self, read: dict[str, Reading], limit: int) -> None:
        for split in self.splits:
            native = self._native[split]
            ranks, reason = read[native].ranks, self._reason[native]
            left = (self._place[native] == _SPLITS.index(split)) & (reason == 0)
            if left.sum() > limit:
                last = np.partition(ranks[left], limit - 1)[limit - 1]
                reason[left & (ranks > last)] = _REASONS.index(TOO_MANY)

    def _refuse_shared_ids(self, read: dict[str, Reading]) -> None:
        natives = list(read)
        for at, first in enumerate(natives):
            for second in natives[at + 1 :]:
                shared = np.flatnonzero(np.isin(read[first].ranks, read[second].ranks))
                if len(shared):
                    ((dialogue, _),) = read[first].dialogues(shared[:1])
                    twice = dialogue.dialogue_id
                    raise KestrelError(
                        f"the dialogue_id {twice!r} stands at {self.corpus.place(first, twice)} and at "
                        f"{self.corpus.place(second, twice)}; make it unique."
                    )


def _numbered(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones, ascending, and of each entry its number among them, in half the bytes that numpy takes."""
    distinct, number = np.unique(hashes, return_inverse=True)
    return distinct, number.astype(np.uint32)
