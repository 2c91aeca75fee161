"""Train, validation and test: the source's own where it has them, cut by persona and conversation where it has not.

The literature's splits are kept as they are. Where a source has train and validation only (ConvAI2, whose test set is
hidden), its validation set is our test set, because that is what published numbers are on, and our validation set is cut
from its train set. Where it has train only, both are cut from it.

A cut takes personas, not dialogues. No persona whose owner's replies are validated or tested on stands in train, neither
as an owner's nor as a partner's, and no conversation straddles splits.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator

from kestrel.corpora import Corpus
from kestrel.corpora.repair import persona_key, stable_hash
from kestrel.corpora.tally import Tally
from kestrel.dialogue import Dialogue
from kestrel.errors import KestrelError

MIXED = "owner's persona is of another split than the conversation"
PARTNER_HELD = "partner's persona is held out for validation or test"
TOO_MANY = "more than max_dialogues"

_NO_PERSONA = 0


class Splitter:
    """Streams the dialogues of each split. Deterministic across processes and Python versions.

    Making one reads the corpus once and keeps 32 bytes a dialogue.

    Args:
        corpus: what to split.
        validation_fraction: share of train's personas that make the validation set, where the source has none to give;
            0: no validation set.
        test_fraction: the same for the test set.
        seed: of the choice of personas, and of dialogues where `max_dialogues` chooses.
        max_dialogues: keep so many dialogues of each split at most, chosen at random; None: all.

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
        self.splits = tuple(split for split in ("train", "validation", "test") if split in self._native)
        self.origin = {
            split: "cut from train" if split in self._fractions else self._native[split] for split in self.splits
        }

        # Personas and conversations held out of train, by hash; split they are held for.
        self._personas: dict[int, str] = {}
        self._conversations: dict[int, str] = {}
        # A dialogue is among those that max_dialogues keeps when its rank is not above its split's.
        self._last_rank: dict[str, int] = {}

        index = {split: _Index(corpus, split, seed) for split in dict.fromkeys(self._native.values())}
        self._refuse_shared_ids(index)
        self._cut(index["train"])
        self.persona_overlap = self._overlap(index)
        if max_dialogues is not None:
            self._limit(index, max_dialogues)

    def read(self, split: str, tally: Tally) -> Iterator[Dialogue]:
        """Streams the dialogues of a split, in the order of the source.

        The tallies of the splits cut from one split of the source add up to the tally of that split: a dialogue that the
        reader drops counts for the split of the dialogue that follows it.

        Raises:
            KestrelError: no such split, malformed data, or no dialogue left.
        """
        if split not in self.splits:
            raise KestrelError(
                f"there is no {split} split of {self.corpus.source}; there are {', '.join(self.splits)}."
            )
        native = self._native[split]
        since = Tally()
        kept_any = False
        for dialogue in self.corpus.read(native, since):
            conversation, owner, partner = _keys(dialogue)
            place, reason = self._assign(split, conversation, owner, partner)
            if place == split:
                if reason is None and _rank(dialogue, self.seed) > self._last_rank.get(split, 2**64):
                    reason = TOO_MANY
                if reason is not None:
                    since.kept -= 1
                    since.drop(reason, f"dialogue {dialogue.dialogue_id}")
                tally.absorb(since)
                if reason is None:
                    kept_any = True
                    yield dialogue
            since.clear()
        if self.origin[split] == native:
            tally.absorb(since)
        if not kept_any:
            reasons = "; ".join(f"{count:,}: {reason}" for reason, count in tally.dropped.most_common())
            raise KestrelError(f"{self.corpus.source}: no dialogue is left for the {split} split ({reasons}).")

    def _assign(self, split: str, conversation: int, owner: int, partner: int) -> tuple[str, str | None]:
        """The split that a conversation goes to, and why this dialogue of it is left out, if so."""
        if self._native[split] != "train":
            return split, None
        place = self._conversations.get(conversation, "train")
        if place != "train":
            return place, None if self._personas.get(owner) == place else MIXED
        return "train", PARTNER_HELD if partner in self._personas else None

    def _cut(self, train: _Index) -> None:
        for split, fraction in self._fractions.items():
            free = {
                owner
                for owner, conversation in zip(train.owners, train.conversations, strict=True)
                if owner not in self._personas and conversation not in self._conversations
            }
            ranked = sorted(free, key=lambda persona: stable_hash(str(self.seed), str(persona)))
            chosen = ranked[: max(1, round(fraction * len(set(train.owners))))]
            if len(chosen) == len(ranked):
                raise KestrelError(
                    f"{self.corpus.source}: too few personas ({len(set(train.owners))}) to cut a {split} split that shares "
                    "none with train. Bring more data, or set that split's fraction to 0."
                )
            self._personas |= dict.fromkeys(chosen, split)
            for owner, conversation in zip(train.owners, train.conversations, strict=True):
                if self._personas.get(owner) == split:
                    self._conversations.setdefault(conversation, split)

    def _overlap(self, index: dict[str, _Index]) -> dict[str, dict[str, int]]:
        in_train = {*index["train"].owners, *index["train"].partners}
        overlap: dict[str, dict[str, int]] = {}
        for split in self.splits:
            if self._native[split] != "train":
                personas = set(index[self._native[split]].owners)
                overlap[split] = {"personas": len(personas), "in_train": len(personas & in_train)}
        return overlap

    def _limit(self, index: dict[str, _Index], limit: int) -> None:
        for split in self.splits:
            entries = index[self._native[split]]
            ranks = (
                rank
                for rank, *keys in zip(
                    entries.ranks, entries.conversations, entries.owners, entries.partners, strict=True
                )
                if self._assign(split, *keys) == (split, None)
            )
            self._last_rank[split] = max(heapq.nsmallest(limit, ranks), default=0)

    def _refuse_shared_ids(self, index: dict[str, _Index]) -> None:
        natives = list(index)
        for at, first in enumerate(natives):
            for second in natives[at + 1 :]:
                shared = set(index[first].ranks).intersection(index[second].ranks)
                if shared:
                    found = self.corpus.read(first, Tally())
                    twice = next(each.dialogue_id for each in found if _rank(each, self.seed) in shared)
                    raise KestrelError(
                        f"the dialogue_id {twice!r} stands at {self.corpus.place(first, twice)} and at "
                        f"{self.corpus.place(second, twice)}; make it unique."
                    )


class _Index:
    """One pass over a split: four 64-bit hashes a dialogue."""

    def __init__(self, corpus: Corpus, split: str, seed: int):
        self.conversations, self.owners, self.partners, self.ranks = array("Q"), array("Q"), array("Q"), array("Q")
        for dialogue in corpus.read(split, Tally()):
            for column, key in zip(self._columns(), (*_keys(dialogue), _rank(dialogue, seed)), strict=True):
                column.append(key)

    def _columns(self) -> Iterable[array[int]]:
        return self.conversations, self.owners, self.partners, self.ranks


def _keys(dialogue: Dialogue) -> tuple[int, int, int]:
    """Hashes of conversation, owner's persona and partner's persona; where the owner's is not told (ParlAI's none and
    other), the conversation stands for it."""
    conversation = stable_hash(dialogue.conversation_id)
    owner = persona_key(dialogue.persona) if dialogue.persona else conversation
    partner = persona_key(dialogue.partner_persona) if dialogue.partner_persona else _NO_PERSONA
    return conversation, owner, partner


def _rank(dialogue: Dialogue, seed: int) -> int:
    return stable_hash(str(seed), "dialogue", dialogue.dialogue_id)
