"""What a system must beat: replies that need no model, in every table.

A constant senseless reply has beaten every entrant of ConvAI2 in F1, so no score means anything without these.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kestrel.data.dataset import load_split
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.systems import Answered, System
from kestrel.evaluation.units import ENGLISH, Units
from kestrel.runtime.manifest import read_manifest

TRIVIAL = {
    "copy_partner": "the partner's turn just before, copied",
    "random_persona": "a sentence of the persona, drawn at random",
    "random_reply": "the reference of a reply in another dialogue, drawn at random",
    "constant_reply": "one reply for every context: the human reply with the best mean F1",
    "constant_words": "one bag of frequent words for every context, grown word by word for the best mean F1",
}
_MOST_REFERENCES = 10_000  # in the search for a constant: the third digit of a mean F1 is settled by then
_MOST_CANDIDATES = 2_000
_VOCABULARY = 300
_LONGEST = 40
Split = Callable[[str], list[str]]


def trivial_systems(
    replies: Sequence[Reply], seed: int, search: Sequence[str] | None, units: Units = ENGLISH
) -> tuple[dict[str, System], list[str]]:
    """The trivial systems' answers to the contexts of `replies`.

    Args:
        replies: of any system; their contexts and references are used, their responses are not.
        search: replies of another split, in which the constants are searched; None searches the constants of each half
            of the dialogues in the other half, so that none has seen the references that it is scored on.

    Returns:
        The systems, in the order of `TRIVIAL`; and what could not be made, and why.
    """
    systems: dict[str, System] = {}
    notes: list[str] = []

    def add(name: str, responses: Iterable[str], more: str = "") -> None:
        systems[name] = System("trivial", TRIVIAL[name] + more, Answered(replies, list(responses)))

    generator = random.Random(seed)
    if replies[0].history is None:
        notes.append("copy_partner is left out: the files have no history.")
    else:
        add("copy_partner", map(_last_of_partner, replies))
    if not any(reply.persona for reply in replies):
        notes.append("random_persona is left out: the files have no persona.")
    else:
        add("random_persona", [generator.choice(r.persona) if r.persona else "" for r in replies])
    dialogues = sorted({reply.dialogue_id for reply in replies})
    if len(dialogues) < 2:
        notes.append("random_reply is left out: it needs a second dialogue.")
    else:
        add("random_reply", _of_other_dialogues(replies, seed))
    if search is None and len(dialogues) < 2:
        notes.append("constant_reply and constant_words are left out: they need another split or a second dialogue.")
        return systems, notes
    half = set(random.Random(seed).sample(dialogues, len(dialogues))[: len(dialogues) // 2])
    halves = [[r.reference for r in replies if (r.dialogue_id in half) == own] for own in (False, True)]
    for name, best in (("constant_reply", best_constant), ("constant_words", best_words)):
        found = [best(texts, units.words) for texts in (halves if search is None else [search])]
        where = ", found for each half of the dialogues in the other half" if search is None else ""
        add(
            name,
            [found[0] if reply.dialogue_id in half else found[-1] for reply in replies],
            f"{where}: {', '.join(map(repr, found))}",
        )
    return systems, notes


def _last_of_partner(reply: Reply) -> str:
    """Empty where the owner of the persona opens the dialogue."""
    return next((turn.text for turn in reversed(reply.history or ()) if turn.speaker == "partner"), "")


def _of_other_dialogues(replies: Sequence[Reply], seed: int) -> list[str]:
    generator = random.Random(seed)
    drawn = []
    for reply in replies:
        while (other := generator.choice(replies)).dialogue_id == reply.dialogue_id:
            pass
        drawn.append(other.reference)
    return drawn


def _word_counts(texts: Sequence[str], words: Sequence[str]) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Counts of `words` in each text, shape (texts, words), and each text's length in all words, shape (texts,)."""
    column = {word: j for j, word in enumerate(words)}
    counts = np.zeros((len(texts), len(words)), dtype=np.int16)
    for i, text in enumerate(texts):
        for word in text.split():
            if word in column:
                counts[i, column[word]] += 1
    return counts, np.array([len(text.split()) for text in texts], dtype=np.float64)


def _sample(texts: Sequence[str], split: Split) -> list[str]:
    """Evenly spaced texts, `_MOST_REFERENCES` at most, as words between spaces."""
    step = max(1, len(texts) / _MOST_REFERENCES)
    return [" ".join(split(texts[int(i * step)])) for i in range(int(len(texts) / step))]


def best_constant(references: Sequence[str], split: Split = ENGLISH.words) -> str:
    """The one among the references (the most frequent 2,000 wordings) with the best mean F1 against all of them.

    Args:
        split: a text into the words that F1 compares.
    """
    gold = _sample(references, split)
    written = {" ".join(split(text)): text for text in reversed(references)}
    candidates = [text for text, _ in Counter(gold).most_common(_MOST_CANDIDATES) if text]
    words = sorted({word for text in candidates for word in text.split()})
    counts, lengths = _word_counts(gold, words)
    column = {word: j for j, word in enumerate(words)}

    def mean_f1(candidate: str) -> float:
        own = Counter(candidate.split())
        overlap = sum(np.minimum(counts[:, column[word]], count) for word, count in own.items())
        return float((2 * overlap / (lengths + own.total())).mean())

    return written[max(candidates, key=mean_f1)] if candidates else references[0]


def best_words(references: Sequence[str], split: Split = ENGLISH.words) -> str:
    """Words that together have the best mean F1 against the references, found greedily; their order means nothing."""
    gold = _sample(references, split)
    frequent = [word for word, _ in Counter(word for text in gold for word in text.split()).most_common(_VOCABULARY)]
    counts, lengths = _word_counts(gold, frequent)
    chosen: list[int] = []
    taken = np.zeros(len(frequent), dtype=np.int16)
    overlap = np.zeros(len(gold))
    best_f1 = 0.0
    while frequent and len(chosen) < _LONGEST:
        # F1 is 2 * overlap / (both lengths), so the gain of every word comes out of one product.
        weights = 2 / (len(chosen) + 1 + lengths)
        gains = weights @ (counts > taken)
        f1 = float(weights @ overlap + gains.max()) / len(gold)
        if f1 <= best_f1:
            break
        word = int(gains.argmax())
        overlap += counts[:, word] > taken[word]
        taken[word] += 1
        chosen.append(word)
        best_f1 = f1
    return " ".join(frequent[word] for word in chosen)


def replies_of_other_split(
    run_dir: Path | None, split: str | None, dialogue_ids: set[str]
) -> tuple[list[str] | None, str]:
    """Human replies of the run's training split (of validation, where train is what is scored).

    Args:
        split: the split that is scored; None where it is unknown.
        dialogue_ids: of the scored replies. A run whose dataset does not hold them is of another corpus.

    Returns:
        The replies and the split's name; or None and why there are none.

    Raises:
        KestrelError: the dataset is damaged.
    """
    if run_dir is None:
        return None, "no run is named"
    folder = run_dir / "dataset"
    if split is None:
        return None, "the file's name says no split"
    source = "validation" if split == "train" else "train"
    if not (folder / source).is_dir() or not (folder / split).is_dir():
        return None, f"{folder} has no {source} split"
    remedy = "make it again with preprocess.py"
    read_manifest(folder, "dataset", remedy)
    if not dialogue_ids <= set(load_split(folder, split, remedy)["dialogue_id"]):
        return None, f"{folder} is of other dialogues"
    rows = load_split(folder, source, remedy)["turns"]
    texts = [turn["text"] for turns in rows for turn in turns if turn["speaker"] == "self"]
    return texts or None, source
