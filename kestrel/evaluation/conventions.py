"""Scores by definitions that papers use without saying so, beside ours and never in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from kestrel.evaluation.evaluate_library import extra_scores, load_metrics
from kestrel.evaluation.scoring import Evaluation
from kestrel.evaluation.units import normalize_answer

Pairs = Sequence[tuple[str, str]]  # response and reference of each reply


@dataclass(frozen=True)
class Convention:
    """One definition. `signature` says all that decides the number; `score` takes the pairs of a system."""

    label: str
    signature: str
    score: Callable[[Pairs], float]


def _sentence_bleu(pairs: Pairs, words: Callable[[str], list[str]], epsilon: float) -> float:
    """The mean of NLTK's sentence BLEU-4 with its smoothing method 1, 0 to 100."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # type: ignore[import-untyped]

    smoothing = SmoothingFunction(epsilon=epsilon).method1
    scores = [
        sentence_bleu([words(reference)], words(response), smoothing_function=smoothing) if response.strip() else 0.0
        for response, reference in pairs
    ]
    return 100 * sum(scores) / len(scores)


def _corpus_bleu(pairs: Pairs) -> float:
    """NLTK's corpus BLEU-4 of words between spaces, without smoothing, 0 to 100."""
    from nltk.translate.bleu_score import corpus_bleu

    references, responses = [[reference.split()] for _, reference in pairs], [response.split() for response, _ in pairs]
    with warnings.catch_warnings(action="ignore"):  # it says at length that a score of 0 is one
        return float(100 * corpus_bleu(references, responses))


def _of_library(name: str, key: str, **options: Any) -> Callable[[Pairs], float]:
    """A metric of the evaluate library, as it defines it, on 0 to 100."""
    metrics = load_metrics([name], "evaluation.conventions")

    def score(pairs: Pairs) -> float:
        return 100 * (extra_scores(metrics, pairs, **options)[name][key] or 0.0)

    return score


def conventions(names: Sequence[str], language: str) -> dict[str, Convention]:
    """The definitions by the names that `evaluation.conventions` has for them.

    Args:
        language: of the replies, for BERTScore's choice of a model.

    Raises:
        KestrelError: one needs a library or a script of the Hub that is not here.
    """
    nltk = metadata.version("nltk")
    makers: Mapping[str, Callable[[], Convention]] = {
        # parlai/core/metrics.py, BleuMetric: the mean over replies of NLTK's sentence BLEU of normalized words.
        "parlai_bleu4": lambda: Convention(
            "ParlAI BLEU-4",
            f"nltk:{nltk}|sentence|method:1|epsilon:1e-12|normalization:parlai|average:replies",
            lambda pairs: _sentence_bleu(pairs, lambda text: normalize_answer(text).split(" "), 1e-12),
        ),
        "nltk_sentence_bleu": lambda: Convention(
            "NLTK sentence BLEU",
            f"nltk:{nltk}|sentence|method:1|epsilon:0.1|words:spaces|average:replies",
            lambda pairs: _sentence_bleu(pairs, str.split, 0.1),
        ),
        "nltk_corpus_bleu": lambda: Convention(
            "NLTK corpus BLEU", f"nltk:{nltk}|corpus|smoothing:none|words:spaces", _corpus_bleu
        ),
        "meteor": lambda: Convention("METEOR", "evaluate:meteor", _of_library("meteor", "meteor")),
        "bertscore": lambda: Convention(
            "BERTScore F1", f"evaluate:bertscore|lang:{language}", _of_library("bertscore", "f1", lang=language)
        ),
    }
    return {name: makers[name]() for name in names}


def add_conventions(evaluation: Evaluation, definitions: Mapping[str, Convention]) -> None:
    """Adds the scores to what metrics.json says; of texts as the files have them, without `evaluation.normalization`."""
    if not definitions:
        return
    metrics = evaluation.metrics
    metrics["conventions"] = {name: {"label": c.label, "signature": c.signature} for name, c in definitions.items()}
    for name, system in evaluation.systems.items():
        pairs = [(reply.response, reply.reference) for reply in system.replies]
        metrics["systems"][name]["conventions"] = {key: c.score(pairs) for key, c in definitions.items()}
