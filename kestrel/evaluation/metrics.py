"""The arithmetic of each score: per-reply statistics that add up, and the score of their sums.

Every score with an interval is a function of sums over replies, so its sums over dialogues are all that intervals and
tests need. The definitions are those of the reference implementations: sacreBLEU for BLEU, rouge_score for ROUGE-L,
ParlAI for F1. `metric_table` says which scores exist and where they show.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.evaluation.generations import Reply
from kestrel.evaluation.resampling import Array
from kestrel.evaluation.units import ENGLISH, Units, normalize_answer

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU, BLEUScore

Rows = Sequence[Sequence[float]]  # statistics of N replies, K numbers each

NORMALIZERS: dict[str, Callable[[str], str]] = {"raw": str, "lower": str.lower, "parlai": normalize_answer}
# Speaker tags as prompts and corpora write them. One inside a reply means that the model went on to speak for others.
SPEAKER_TAG = re.compile(
    r"(?:^|\s|\*\*|[<\[])(?:partner|self|user|bot|assistant|human|system|(?:your|partner's) persona"
    r"|(?:user|persona|speaker|person) ?[ab12])(?:\*\*)?\s*[>\]]?:|<\|[a-z_]+\|>|>>[A-Z]+<<",
    re.IGNORECASE,
)


class Rarity(dict[str, float]):
    """The weight of each word; a word that is not among them weighs 1."""

    def __missing__(self, word: str) -> float:
        return 1.0

    def total(self, words: Iterable[str]) -> float:
        return math.fsum(map(self.__getitem__, words))


@dataclass(frozen=True)
class Choices:
    """What decides how texts are compared.

    Attributes:
        normalization: of the texts that BLEU and ROUGE-L compare, `evaluation.normalization`.
        stemmer: whether the headline ROUGE-L stems, which only English does.
        references: of each reply; -1 where replies have different numbers of them.
        rarity: the weight of a word in scores of persona.
    """

    units: Units = ENGLISH
    normalization: str = "raw"
    stemmer: bool = False
    references: int = 1
    rarity: Rarity = field(default_factory=Rarity)

    def normalize(self, text: str) -> str:
        return NORMALIZERS[self.normalization](text)

    @property
    def best_of(self) -> str:
        """The part of signatures that tells of several references."""
        return (
            "" if self.references == 1 else f"|references:best of {'var' if self.references < 0 else self.references}"
        )


class References:
    """What N replies are compared with, prepared once for all systems."""

    def __init__(self, replies: Sequence[Reply], choices: Choices) -> None:
        self.choices = choices
        self.texts = [tuple(map(choices.normalize, reply.references)) for reply in replies]

    @cached_property
    def bleu(self) -> BLEU:
        return _bleu(self.choices, False, self.texts)

    @cached_property
    def bleu_lowercase(self) -> BLEU:
        """The same object where no reference has a capital letter."""
        lower = all(text == text.lower() for texts in self.texts for text in texts)
        return self.bleu if lower else _bleu(self.choices, True, self.texts)


@dataclass(frozen=True, eq=False)
class Answers:
    """One system's answers to N contexts, as every metric sees them. Equal to itself alone, so that it can be a key."""

    replies: Sequence[Reply]
    references: References

    @property
    def choices(self) -> Choices:
        return self.references.choices

    @cached_property
    def responses(self) -> list[str]:
        return [self.choices.normalize(reply.response) for reply in self.replies]

    @cached_property
    def bleu_rows(self) -> Rows:
        return self.references.bleu._extract_corpus_statistics(self.responses, None)

    @cached_property
    def bleu_rows_lowercase(self) -> Rows:
        lower = [response.lower() for response in self.responses]
        if lower == self.responses and self.references.bleu_lowercase is self.references.bleu:
            return self.bleu_rows
        return self.references.bleu_lowercase._extract_corpus_statistics(lower, None)


# Scores of sums: from shape (B, K), the summed statistics of B corpora, to shape (B,).


def ratio(sums: Array) -> Array:
    """The first sum over the second; not a number where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def points(sums: Array) -> Array:
    """The ratio on 0-100."""
    return ratio(sums * (100.0, 1.0))


def perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def bits(sums: Array) -> Array:
    """Nats over bytes to bits per byte."""
    return ratio(sums) / math.log(2)


def bleu(sums: Array) -> Array:
    """Corpus BLEU, 0-100, from sums of sacreBLEU's statistics: lengths, matches and n-grams.

    One corpus has sacreBLEU's own score, to the last digit. Many, as resampling has them, have its formula at once.
    """
    if len(sums) == 1:
        return np.array([_bleu_score(sums[0]).score])
    matches, grams = sums[:, 2:6], sums[:, 6:10]
    smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=1))  # its smoothing "exp"
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.minimum(0, 1 - sums[:, 1] / sums[:, 0]) + np.log(100 * smoothed / grams).mean(axis=1)
    return np.where((grams > 0).all(axis=1) & (matches > 0).any(axis=1), np.exp(logs), 0.0)


def _bleu_score(sums: Array) -> BLEUScore:
    from sacrebleu.metrics.bleu import BLEU

    sys_len, ref_len, *counts = (int(value) for value in sums)
    return BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp")


# Statistics of replies, and what else metrics.json says of a score.


def mean_of(value: Callable[[Reply], float]) -> Callable[[Answers], Rows]:
    """Statistics of a score that is the mean of one number per reply."""
    return lambda answers: [(value(reply), 1) for reply in answers.replies]


def bleu_details(_: Sequence[Reply], sums: Array) -> dict[str, Any]:
    """What corpus BLEU is made of. `sums` has shape (10,)."""
    score = _bleu_score(sums)
    lengths = {"sys_len": score.sys_len, "ref_len": score.ref_len}
    return {"precisions": score.precisions, "brevity_penalty": score.bp} | lengths


def bleu_signature(choices: Choices, lowercase: bool = False) -> str:
    """sacreBLEU's own signature."""
    metric = _bleu(choices, lowercase)
    metric.num_refs = choices.references
    return str(metric.get_signature())


def _bleu(choices: Choices, lowercase: bool, references: Sequence[Sequence[str]] = ()) -> BLEU:
    """sacreBLEU's object, which counts the n-grams of the references of each reply once."""
    from sacrebleu.metrics.bleu import BLEU

    streams = list(zip_longest(*references)) or None
    return BLEU(lowercase=lowercase, tokenize=choices.units.tokenizer, force=True, references=streams)


def rouge_statistics(answers: Answers, other: bool = False) -> Rows:
    """ROUGE-L with the stemmer choice of the settings, or with the other one."""
    units, stemmer = answers.choices.units, answers.choices.stemmer != other
    pairs = zip(answers.responses, answers.references.texts, strict=True)
    return [(max(rouge_l(response, text, stemmer, units) for text in texts), 1) for response, texts in pairs]


def rouge_signature(choices: Choices, other: bool = False) -> str:
    """In sacreBLEU's manner, for a library that has no signatures of its own."""
    stemmer, version = "yes" if choices.stemmer != other else "no", metadata.version("rouge_score")
    how = f"stemmer:{stemmer}|version:{version}" if choices.units.english else choices.units.words_name
    return f"type:rougeL|score:fmeasure|average:replies|{how}{choices.best_of}"


def rouge_l(response: str, reference: str, stemmer: bool, units: Units = ENGLISH) -> float:
    """rouge_score's rougeL F-measure of one reply, 0 to 1: its formula over a faster subsequence."""
    guess, gold = units.rouge_words(response, stemmer), units.rouge_words(reference, stemmer)
    return f_measure(longest_common_subsequence(guess, gold), len(guess), len(gold))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by Hyyro's bit-parallel algorithm (2004): a zero in `state` for each word of the subsequence."""
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    everywhere = (1 << len(first)) - 1
    state = everywhere
    for word in second:
        matches = state & places.get(word, 0)
        state = (state + matches | state - matches) & everywhere
    return len(first) - state.bit_count()


def f_measure(common: float, guess: float, gold: float) -> float:
    if common == 0:
        return 0.0
    precision, recall = common / guess, common / gold
    return 2 * precision * recall / (precision + recall)


def f1_statistics(answers: Answers) -> Rows:
    """The best F1 over the references of each reply, as ParlAI takes it."""
    units = answers.choices.units
    return [(max(f1_score(reply.response, text, units) for text in reply.references), 1) for reply in answers.replies]


def f1_signature(choices: Choices) -> str:
    how = "normalization:parlai" if choices.units.english else choices.units.words_name
    return f"type:f1|{how}|average:replies{choices.best_of}"


def f1_score(response: str, reference: str, units: Units = ENGLISH) -> float:
    """ParlAI's F1 of one reply, 0 to 1: overlap of the two multisets of words."""
    guess, gold = units.words(response), units.words(reference)
    return f_measure((Counter(guess) & Counter(gold)).total(), len(guess), len(gold))


def nll_per(unit: Callable[[Reply, Units], int]) -> Callable[[Answers], Rows]:
    """Statistics of the references' likelihood: nats, and how many tokens, words or bytes a reference has."""
    return lambda answers: [(r.reference_nll or 0.0, unit(r, answers.choices.units)) for r in answers.replies]


def rank(reply: Reply) -> int | None:
    """Of the reference among its candidates by likelihood per token, from 1; None without candidates.

    With ties counted against the reference, the order of the candidates has no influence, so none needs to be shuffled.
    """
    if not reply.candidate_nll or reply.reference_nll is None or not reply.reference_tokens:
        return None
    own = reply.reference_nll / reply.reference_tokens
    return 1 + sum(nll / tokens <= own for nll, tokens in reply.candidate_nll)


def hits_at(k: int) -> Callable[[Answers], Rows]:
    """Whether the reference is among the k likeliest, for replies with more than k candidates, the reference included."""

    def statistics(answers: Answers) -> Rows:
        ranks = [rank(r) if r.candidate_nll and len(r.candidate_nll) >= k else None for r in answers.replies]
        return [(place <= k, 1) if place else (0, 0) for place in ranks]

    return statistics


def reciprocal_rank(answers: Answers) -> Rows:
    """1 / rank of the reference among the candidates (Voorhees, "The TREC-8 Question Answering Track Report", 1999)."""
    return [(1 / place, 1) if (place := rank(reply)) else (0, 0) for reply in answers.replies]


def hit_details(replies: Sequence[Reply], sums: Array) -> dict[str, Any]:
    """Candidates per reply (one number, or the fewest and the most), and the replies that have some."""
    sizes = {len(reply.candidate_nll) + 1 for reply in replies if reply.candidate_nll}
    return {"candidates": [min(sizes), max(sizes)] if len(sizes) > 1 else sizes.pop(), "replies": int(sums[1])}


def copies_of(sources: Callable[[Reply], Iterable[str]]) -> Callable[[Answers], Rows]:
    """Statistics of the share of responses that are one of their sources, punctuation, case and articles aside."""

    def statistics(answers: Answers) -> Rows:
        words = answers.choices.units.words
        rows = []
        for reply in answers.replies:
            response = words(reply.response)
            rows.append((bool(response) and any(response == words(source) for source in sources(reply)), 1))
        return rows

    return statistics


def distinct(responses: Iterable[str], n: int, units: Units = ENGLISH) -> float:
    """distinct-n (Li et al., 2016): different n-grams over all n-grams, 0 to 1, words lower-cased as in BLEU.

    It falls as the number of replies grows, so it compares only with a value at the same number of them.
    """
    different: set[tuple[str, ...]] = set()
    count = 0
    for words in map(units.tokens, responses):
        different.update(zip(*(words[i:] for i in range(n)), strict=False))
        count += max(0, len(words) - n + 1)
    return len(different) / count if count else 0.0
