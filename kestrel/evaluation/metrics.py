"""What each score is: per-reply statistics that add up, and the scores of their sums.

Every score here is a function of sums over replies. So one matrix product gives all resamples of a bootstrap, and the
reported score is the same function on the plain sums. The definitions are those of the reference implementations:
sacreBLEU for BLEU, rouge_score for ROUGE-L, ParlAI for F1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kestrel.evaluation.generations import Reply

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

Array = NDArray[np.float64]
Sums = Mapping[str, Array]

NORMALIZATIONS = ("raw", "lower", "parlai")
SCORED_ON_100 = ("bleu", "bleu_lc", "rouge_l", "rouge_l_other", "f1")
_ORDER = 4  # BLEU's longest n-gram

# ParlAI, parlai/core/metrics.py: each of the 32 ASCII punctuation marks becomes a space, then each article.
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Who is speaking, as prompts and corpora write it: such a tag inside a reply means that the model went on for others.
_SPEAKER_TAG = re.compile(
    r"(?:^|\s|\*\*|[<\[])(?:partner|self|user|bot|assistant|human|system|(?:your|partner's) persona"
    r"|(?:user|persona|speaker|person) ?[ab12])(?:\*\*)?\s*[>\]]?:|<\|[a-z_]+\|>|>>[A-Z]+<<",
    re.IGNORECASE,
)


@lru_cache(maxsize=1 << 18)
def normalize_answer(text: str) -> str:
    """ParlAI's normalization: lower case, punctuation and articles to spaces, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


def normalizer(name: str) -> Callable[[str], str]:
    """The text normalization applied alike to references and responses before BLEU and ROUGE-L."""
    functions: dict[str, Callable[[str], str]] = {"raw": str, "lower": str.lower, "parlai": normalize_answer}
    return functions[name]


def f1_score(response: str, reference: str) -> float:
    """ParlAI's F1 of one reply, 0 to 1: overlap of the two multisets of normalized words."""
    guess, gold = normalize_answer(response).split(), normalize_answer(reference).split()
    same = sum((Counter(guess) & Counter(gold)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(guess), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@lru_cache(maxsize=4)
def _bleu(lowercase: bool) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(lowercase=lowercase, force=True)


def _ngrams(text: str) -> tuple[Counter[tuple[str, ...]], int]:
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    ngrams, words = extract_all_word_ngrams(text, 1, _ORDER)
    return ngrams, words


_reference_ngrams = lru_cache(maxsize=1 << 15)(_ngrams)


@lru_cache(maxsize=1 << 17)
def _bleu_words(text: str) -> str:
    return str(_bleu(False).tokenizer(text.rstrip()))


def tokens_13a(text: str) -> list[str]:
    """Words as sacreBLEU counts them (mteval-v13a), lower-cased."""
    return _bleu_words(text.lower()).split()


def _bleu_counts(response: str, reference: str) -> list[int]:
    """sacreBLEU's statistics of one reply: both lengths, clipped matches and totals of n-grams of order 1 to 4."""
    known, ref_len = _reference_ngrams(_bleu_words(reference))
    ngrams, sys_len = _ngrams(_bleu_words(response))
    correct, total = [0] * _ORDER, [0] * _ORDER
    for ngram, count in ngrams.items():
        order = len(ngram) - 1
        total[order] += count
        if ngram in known:
            correct[order] += min(count, known[ngram])
    return [sys_len, ref_len, *correct, *total]


def bleu_signature(lowercase: bool) -> str:
    """sacreBLEU's own signature of the scores below."""
    metric = _bleu(lowercase)
    metric.corpus_score(["a"], [["a"]])  # the signature counts the references it has seen
    return str(metric.get_signature())


def rouge_signature(stemmer: bool) -> str:
    """In sacreBLEU's manner, for a library that has no signatures of its own."""
    return f"type:rougeL|score:fmeasure|average:replies|stemmer:{'yes' if stemmer else 'no'}|" + (
        f"version:{metadata.version('rouge_score')}"
    )


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    """Porter's, as rouge_score uses it, asked once a word: systems share most of their words."""
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

    porter = PorterStemmer()
    porter.stem = lru_cache(maxsize=None)(porter.stem)
    return porter


@lru_cache(maxsize=1 << 18)
def _rouge_words(text: str, stemmer: bool) -> list[str]:
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, _stemmer() if stemmer else None))


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


def rouge_l(response: str, reference: str, stemmer: bool) -> float:
    """rouge_score's rougeL F-measure of one reply, 0 to 1: its words and formula over a faster subsequence."""
    guess, gold = _rouge_words(response, stemmer), _rouge_words(reference, stemmer)
    common = longest_common_subsequence(guess, gold)
    if common == 0:
        return 0.0
    precision, recall = common / len(guess), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def reply_statistics(replies: Sequence[Reply], normalization: str, stemmer: bool) -> dict[str, Array]:
    """Statistics of each reply that add up to every score.

    Args:
        replies: N of them, of one system.
        normalization: one of `NORMALIZATIONS`.
        stemmer: the headline ROUGE-L stems; the other one is `rouge_l_other`.

    Returns:
        Columns of shape (N,), float64. What the rows do not have (likelihoods, stop reasons) has no column.
    """
    normalize = normalizer(normalization)
    references = [normalize(reply.reference) for reply in replies]
    responses = [normalize(reply.response) for reply in replies]
    columns: dict[str, Any] = {"replies": np.ones(len(replies))}
    pairs = list(zip(responses, references, strict=True))
    cased = [_bleu_counts(*pair) for pair in pairs]
    lowered = [
        counts if pair == (lower := (pair[0].lower(), pair[1].lower())) else _bleu_counts(*lower)
        for counts, pair in zip(cased, pairs, strict=True)
    ]
    for name, rows in (("bleu", cased), ("bleu_lc", lowered)):
        columns |= dict(zip(_bleu_parts(name), np.array(rows, dtype=np.float64).T, strict=True))
    for name, stem in (("rouge_l", stemmer), ("rouge_l_other", not stemmer)):
        columns[name] = [rouge_l(*pair, stem) for pair in pairs]
    columns["f1"] = [f1_score(reply.response, reply.reference) for reply in replies]
    columns["empty"] = [not reply.response.strip() for reply in replies]
    columns["speaker_tag"] = [bool(_SPEAKER_TAG.search(reply.response)) for reply in replies]
    if replies[0].persona is not None:
        columns["copied_persona"] = [_is_copy(reply.response, reply.persona or ()) for reply in replies]
    if replies[0].history is not None:
        columns["copied_history"] = [
            _is_copy(reply.response, [t.text for t in reply.history or ()]) for reply in replies
        ]
    if replies[0].stopped_by is not None:
        columns["stopped_by_eos"] = [reply.stopped_by == "eos" for reply in replies]
    if replies[0].response_tokens is not None:
        columns["response_tokens"] = [reply.response_tokens for reply in replies]
    if replies[0].reference_nll is not None:
        columns["nll"] = [reply.reference_nll for reply in replies]
        columns["nll_tokens"] = [reply.reference_tokens for reply in replies]
        columns["nll_words"] = [len(reply.reference.split()) for reply in replies]
        columns["nll_bytes"] = [len(reply.reference.encode()) for reply in replies]
    ranked = [bool(reply.candidate_nll) and reply.reference_nll is not None for reply in replies]
    if any(ranked):
        columns["ranked"] = ranked
        columns["hits"] = [is_hit(reply) for reply in replies]
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}


def _bleu_parts(name: str) -> list[str]:
    orders = range(1, _ORDER + 1)
    return [
        f"{name}.sys_len", f"{name}.ref_len", *(f"{name}.correct{n}" for n in orders),
        *(f"{name}.total{n}" for n in orders),
    ]  # fmt: skip


def _is_copy(response: str, sources: Sequence[str]) -> bool:
    words = normalize_answer(response)
    return bool(words) and any(words == normalize_answer(source) for source in sources)


def is_hit(reply: Reply) -> bool:
    """Whether the reference is likelier per token than each of its distractors; a tie is a miss.

    With ties counted against, the order of the candidates has no influence, so none needs to be shuffled.
    """
    if not reply.candidate_nll or reply.reference_nll is None or not reply.reference_tokens:
        return False
    own = reply.reference_nll / reply.reference_tokens
    return all(own < nll / tokens for nll, tokens in reply.candidate_nll)


def bleu_details(columns: Mapping[str, Array], name: str) -> dict[str, Any]:
    """Corpus BLEU of all replies by sacreBLEU's own arithmetic, with what it is made of.

    Args:
        columns: of `reply_statistics`, shape (N,).
        name: bleu or bleu_lc.
    """
    sys_len, ref_len, *counts = (int(columns[part].sum()) for part in _bleu_parts(name))
    score = _bleu(name == "bleu_lc").compute_bleu(
        counts[:_ORDER], counts[_ORDER:], sys_len, ref_len, smooth_method="exp"
    )
    return {
        "score": score.score,
        "precisions": score.precisions,
        "brevity_penalty": score.bp,
        "sys_len": sys_len,
        "ref_len": ref_len,
    }


def bleu_scores(sums: Sums, name: str) -> Array:
    """Corpus BLEU, 0 to 100, of summed statistics, by sacreBLEU with its default `exp` smoothing.

    Args:
        sums: columns of shape (B,): B corpora.
        name: bleu or bleu_lc.
    """
    rows = np.stack([sums[part] for part in _bleu_parts(name)], axis=1).astype(int).tolist()
    compute = _bleu(False).compute_bleu
    return np.array(
        [compute(n[:_ORDER], n[_ORDER:], sys_len, ref_len, smooth_method="exp").score for sys_len, ref_len, *n in rows]
    )


def scores(sums: Sums) -> dict[str, Array]:
    """Every score that the columns allow.

    Args:
        sums: columns of `reply_statistics` summed over replies, each of shape (B,).

    Returns:
        Arrays of shape (B,). BLEU, ROUGE-L and F1 on 0-100; shares on 0-1; perplexities as `perplexity.token` (each
        token of the reference, its end included), `perplexity.word` (the same likelihood per whitespace-separated
        word) and `perplexity.bits_per_byte` (per UTF-8 byte, the only one that compares across tokenizers).
    """
    n = sums["replies"]
    result = {name: bleu_scores(sums, name) for name in ("bleu", "bleu_lc")}
    result |= {name: 100 * sums[name] / n for name in ("rouge_l", "rouge_l_other", "f1")}
    with np.errstate(over="ignore"):
        if "nll" in sums:
            result["perplexity.token"] = np.exp(sums["nll"] / sums["nll_tokens"])
            result["perplexity.word"] = np.exp(sums["nll"] / sums["nll_words"])
            result["perplexity.bits_per_byte"] = sums["nll"] / sums["nll_bytes"] / math.log(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        result["length_ratio"] = sums["bleu.sys_len"] / sums["bleu.ref_len"]
        if "hits" in sums:
            result["hits_at_1"] = sums["hits"] / sums["ranked"]
    for name in ("stopped_by_eos", "empty", "speaker_tag", "copied_persona", "copied_history", "response_tokens"):
        if name in sums:
            result[name] = sums[name] / n
    return result


def distinct(responses: Sequence[str], n: int) -> float:
    """distinct-n (Li et al., 2016): different n-grams over all n-grams, 0 to 1, words lower-cased as in BLEU.

    It falls as the number of replies grows, so it compares only with a value at the same number of them.
    """
    grams = [tuple(words[i : i + n]) for words in map(tokens_13a, responses) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def convention_gap(replies: Sequence[Reply]) -> dict[str, tuple[float, float]]:
    """Writing conventions in which references and responses differ by more than half of the replies.

    Returns:
        casing and spacing, where they differ: (share of references, share of responses) that contain a capital
        letter, or a space before punctuation or a contraction, among those in which one could stand.
    """
    spaced, closed = re.compile(r"\w (?:[.,!?;:]|n't\b|'\w)"), re.compile(r"\w(?:[.,!?;:](?:\s|$)|n't\b|'\w)")

    def share(texts: Sequence[str], having: Callable[[str], Any], among: Callable[[str], Any]) -> float | None:
        considered = [text for text in texts if among(text)]
        return sum(bool(having(text)) for text in considered) / len(considered) if considered else None

    references, responses = [r.reference for r in replies], [r.response for r in replies]
    found = {}
    for name, having, among in (
        ("casing", lambda t: t != t.lower(), str.strip),
        ("spacing", spaced.search, lambda t: spaced.search(t) or closed.search(t)),
    ):
        ours, theirs = share(references, having, among), share(responses, having, among)
        if ours is not None and theirs is not None and abs(ours - theirs) > 0.5:
            found[name] = (ours, theirs)
    return found
