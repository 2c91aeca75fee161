"""The arithmetic of each score: per-reply statistics that add up, and the score of their sums.

Every bootstrapped score is a function of sums over replies. One matrix product therefore gives all resamples, and the
reported score is the same function on the plain sums. The definitions are those of the reference implementations:
sacreBLEU for BLEU, rouge_score for ROUGE-L, ParlAI for F1. `metric_table` says which scores exist and where they show.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kestrel.evaluation.generations import Reply

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU, BLEUScore

Array = NDArray[np.float64]
Rows = Sequence[Sequence[float]]  # statistics of N replies, K numbers each

# ParlAI, parlai/core/metrics.py: each of the 32 ASCII punctuation marks becomes a space, then each article.
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Speaker tags as prompts and corpora write them. One inside a reply means that the model went on to speak for others.
SPEAKER_TAG = re.compile(
    r"(?:^|\s|\*\*|[<\[])(?:partner|self|user|bot|assistant|human|system|(?:your|partner's) persona"
    r"|(?:user|persona|speaker|person) ?[ab12])(?:\*\*)?\s*[>\]]?:|<\|[a-z_]+\|>|>>[A-Z]+<<",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answers:
    """One system's answers to N contexts, as every metric sees them.

    Attributes:
        replies: N rows of the system's file.
        responses, references: their texts under `evaluation.normalization`, which BLEU and ROUGE-L compare.
        stemmer: whether the headline ROUGE-L stems.
        rarity: the weight of a word in scores of persona; words that it lacks weigh 1.
    """

    replies: Sequence[Reply]
    responses: Sequence[str]
    references: Sequence[str]
    stemmer: bool
    rarity: Mapping[str, float]


def answers_of(
    replies: Sequence[Reply], normalization: str, stemmer: bool, rarity: Mapping[str, float] | None = None
) -> Answers:
    normalize = NORMALIZERS[normalization]
    responses, references = [normalize(r.response) for r in replies], [normalize(r.reference) for r in replies]
    return Answers(replies, responses, references, stemmer, rarity or {})


@lru_cache(maxsize=1 << 18)
def normalize_answer(text: str) -> str:
    """ParlAI's normalization: lower case, punctuation and articles to spaces, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"raw": str, "lower": str.lower, "parlai": normalize_answer}

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
    """Corpus BLEU, 0-100, by sacreBLEU, from sums of `bleu_statistics`."""
    return np.array([_bleu_score(row).score for row in sums])


def _bleu_score(sums: Array) -> BLEUScore:
    # Lower-casing and tokenizing happen before counting, so any BLEU object will do.
    return _bleu(False)._compute_score_from_stats([int(value) for value in sums])


# Statistics of replies, and what else metrics.json says of a score.


def mean_of(value: Callable[[Reply], float]) -> Callable[[Answers], Rows]:
    """Statistics of a score that is the mean of one number per reply."""
    return lambda answers: [(value(reply), 1) for reply in answers.replies]


def bleu_statistics(answers: Answers, lowercase: bool = False) -> Rows:
    """sacreBLEU's: lengths of response and reference, clipped matches and totals of n-grams of order 1 to 4."""
    return _bleu(lowercase)._extract_corpus_statistics(answers.responses, [answers.references])


def bleu_details(_: Answers, sums: Array) -> dict[str, Any]:
    """What corpus BLEU is made of. `sums` has shape (10,)."""
    score = _bleu_score(sums)
    lengths = {"sys_len": score.sys_len, "ref_len": score.ref_len}
    return {"precisions": score.precisions, "brevity_penalty": score.bp} | lengths


def bleu_signature(lowercase: bool) -> str:
    """sacreBLEU's own signature."""
    metric = _bleu(lowercase)
    metric.corpus_score(["a"], [["a"]])  # the signature counts the references it has seen
    return str(metric.get_signature())


@lru_cache(maxsize=2)
def _bleu(lowercase: bool) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(lowercase=lowercase, force=True)


def tokens_13a(text: str) -> list[str]:
    """Words as sacreBLEU counts them (mteval-v13a), lower-cased."""
    return _bleu(True)._preprocess_segment(text).split()


def rouge_statistics(answers: Answers, other: bool = False) -> Rows:
    """ROUGE-L with the stemmer choice of the settings, or with the other one."""
    pairs = zip(answers.responses, answers.references, strict=True)
    return [(rouge_l(*pair, answers.stemmer != other), 1) for pair in pairs]


def rouge_signature(stemmer: bool) -> str:
    """In sacreBLEU's manner, for a library that has no signatures of its own."""
    choice, version = "yes" if stemmer else "no", metadata.version("rouge_score")
    return f"type:rougeL|score:fmeasure|average:replies|stemmer:{choice}|version:{version}"


def rouge_l(response: str, reference: str, stemmer: bool) -> float:
    """rouge_score's rougeL F-measure of one reply, 0 to 1: its words and formula over a faster subsequence."""
    guess, gold = _rouge_words(response, stemmer), _rouge_words(reference, stemmer)
    return f_measure(longest_common_subsequence(guess, gold), len(guess), len(gold))


@lru_cache(maxsize=1 << 18)
def _rouge_words(text: str, stemmer: bool) -> list[str]:
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, _stemmer() if stemmer else None))


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    """Porter's, as rouge_score uses it, called once per word: systems share most of their words."""
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

    porter = PorterStemmer()
    porter.stem = lru_cache(maxsize=None)(porter.stem)
    return porter


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


def f1_score(response: str, reference: str) -> float:
    """ParlAI's F1 of one reply, 0 to 1: overlap of the two multisets of normalized words."""
    guess, gold = normalize_answer(response).split(), normalize_answer(reference).split()
    return f_measure((Counter(guess) & Counter(gold)).total(), len(guess), len(gold))


def nll_per(unit: Callable[[Reply], int]) -> Callable[[Answers], Rows]:
    """Statistics of the references' likelihood: nats, and how many tokens, words or bytes a reference has."""
    return lambda answers: [(reply.reference_nll or 0.0, unit(reply)) for reply in answers.replies]


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


def hit_details(answers: Answers, sums: Array) -> dict[str, Any]:
    """Candidates per reply (one number, or the fewest and the most), and the replies that have some."""
    sizes = {len(reply.candidate_nll) + 1 for reply in answers.replies if reply.candidate_nll}
    return {"candidates": [min(sizes), max(sizes)] if len(sizes) > 1 else sizes.pop(), "replies": int(sums[1])}


def is_copy(response: str, sources: Iterable[str]) -> bool:
    """Whether the response is one of the sources, punctuation, case and articles aside."""
    words = normalize_answer(response)
    return bool(words) and any(words == normalize_answer(source) for source in sources)


def distinct(responses: Sequence[str], n: int) -> float:
    """distinct-n (Li et al., 2016): different n-grams over all n-grams, 0 to 1, words lower-cased as in BLEU.

    It falls as the number of replies grows, so it compares only with a value at the same number of them.
    """
    grams = [tuple(words[i : i + n]) for words in map(tokens_13a, responses) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
