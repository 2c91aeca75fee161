"""Train, validation and test: the source's own where it has them, otherwise cut by persona and conversation.

The literature's splits are kept as they are. Where a source has train and validation only (ConvAI2, whose test set is
hidden), its validation set is our test set, because published numbers are on it, and our validation set is cut from its
train set. Where it has train only, both are cut from it.

A cut takes personas, not dialogues. A persona whose owner's replies are validated or tested on is not in train, neither
as an owner's nor as a partner's, and the dialogues of one conversation are all in one split. If that would leave dialogues
out, groups of personas that talk to each other are cut instead, unless most of them hang together. Where there are too
few personas, as in one's own chats, conversations are cut, and the report says what no test can tell then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kestrel.data.corpus import Corpus
from kestrel.data.read_counts import ReadCounts, reasons
from kestrel.data.reading import NO_PERSONA, Reading, require_unique_ids
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
        persona_overlap: for each split taken from the source as it is, or cut by conversation: how many personas its
            owners have ("personas") and how many of them are in train too, as an owner's or a partner's ("in_train").

    Raises:
        KestrelError: malformed data, the same dialogue_id in two splits, or too few conversations to cut.
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
        unit = self._cut(self._readings["train"]) if self._fractions else ""
        self.origin = {
            split: f"cut from train{unit}" if split in self._fractions else self._source_split[split]
            for split in self.splits
        }
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

    def _cut(self, train: Reading) -> str:
        """Assigns train's dialogues; returns what was cut where it is not personas."""
        by_persona = self._cut_by_persona(train)
        if by_persona is not None and not by_persona[1].any():
            self._assigned["train"], self._reasons["train"] = by_persona
            return ""
        groups, group_of = _indexed(_groups(train))
        held = self._hold(groups, len(groups))
        if held is not None and np.bincount(group_of).max() * 2 <= len(group_of):
            self._assigned["train"] = held[group_of]
            return ""
        wanted = 1 + len(self._fractions)
        if by_persona is not None and len(np.unique(by_persona[0][by_persona[1] == 0])) == wanted:
            self._assigned["train"], self._reasons["train"] = by_persona
            return ""
        conversations, conversation_of = _indexed(train.conversations)
        held = self._hold(conversations, len(conversations))
        if held is None:
            raise KestrelError(
                f"{self.corpus.source}: too few conversations ({len(conversations)}) to cut {' and '.join(self._fractions)} "
                f"from train; {wanted} are needed at least. Bring more data, "
                + ("lower data.session_gap, " if self.corpus.settings.self else "")
                + "or give a folder with a file for each split."
            )
        self._assigned["train"] = held[conversation_of]
        return " by dialogue"

    def _hold(
        self, keys: np.ndarray, total: int, free: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray | None:
        """The split that each key is held out for; 0, as in SPLITS, is train. None where too few keys are left for train.

        Args:
            keys: hashes of what is cut.
            total: of which the fractions are.
            free: from the split of each key, indices of those that may still be chosen.
        """
        held = np.zeros(len(keys), np.uint8)
        for split, fraction in self._fractions.items():
            left = np.flatnonzero(held == 0) if free is None else free(held)
            hashes = (stable_hash(str(self.seed), str(key)) for key in keys[left])
            ranked = left[np.argsort(np.fromiter(hashes, np.uint64, len(left)), kind="stable")]
            chosen = ranked[: max(1, round(fraction * total))]
            if len(chosen) == len(ranked):
                return None
            held[chosen] = SPLITS.index(split)
        return held

    def _cut_by_persona(self, train: Reading) -> tuple[np.ndarray, np.ndarray] | None:
        """For each dialogue its split, and why it is left out; None where there are too few personas."""
        personas, persona_of = _indexed(train.owners)
        conversations, conversation_of = _indexed(train.conversations)
        held_conversation = np.zeros(len(conversations), np.uint8)

        def free(held: np.ndarray) -> np.ndarray:
            """Personas of which no conversation is held out for another's sake."""
            for split in range(1, len(SPLITS)):
                taken = np.unique(conversation_of[held[persona_of] == split])
                held_conversation[taken[held_conversation[taken] == 0]] = split
            return np.unique(persona_of[(held[persona_of] == 0) & (held_conversation[conversation_of] == 0)])

        held = self._hold(personas, len(personas), free)
        if held is None:
            return None
        free(held)
        assigned = held_conversation[conversation_of]
        why = np.zeros(len(assigned), np.uint8)
        why[(assigned != 0) & (held[persona_of] != assigned)] = _REASONS.index(MIXED)
        why[(assigned == 0) & np.isin(train.partners, personas[held != 0])] = _REASONS.index(PARTNER_HELD)
        return assigned, why

    def _overlap(self) -> dict[str, dict[str, int]]:
        """Personas of splits that were not cut by persona."""
        overlap: dict[str, dict[str, int]] = {}
        train = self._readings["train"]
        for split in self.splits:
            if split != "train" and self.origin[split] != "cut from train":
                name = self._source_split[split]
                here = self._assigned[name] == SPLITS.index(split)
                personas = np.unique(self._readings[name].owners[here])
                learned = self._assigned[name] == 0 if name == "train" else slice(None)
                known = np.isin(personas, train.owners[learned]) | np.isin(personas, train.partners[learned])
                overlap[split] = {"personas": len(personas), "in_train": int(known.sum())}
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


def _groups(reading: Reading) -> np.ndarray:
    """The least hash of all personas and conversations that each dialogue is linked with, over any number of dialogues."""
    above: dict[int, int] = {}

    def root(node: int) -> int:
        while (parent := above.setdefault(node, node)) != node:
            above[node] = node = above[parent]
        return node

    owners = reading.owners.tolist()
    for owner, conversation, partner in zip(
        owners, reading.conversations.tolist(), reading.partners.tolist(), strict=True
    ):
        for other in (conversation, owner if partner == NO_PERSONA else partner):
            one, two = sorted((root(owner), root(other)))
            above[two] = one
    return np.fromiter(map(root, owners), np.uint64, len(owners))
