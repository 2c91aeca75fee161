"""Which metrics exist: one entry each, which scoring, tables, report, plots, comparisons and model card read.

A new metric is one entry here and one function in `metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from kestrel.evaluation import metrics, persona
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import Answers, Choices, Rows
from kestrel.evaluation.resampling import Array
from kestrel.evaluation.units import Units


@dataclass(frozen=True)
class Column:
    """Where a table of `tables.py` shows a metric."""

    table: Literal["scores", "ranking", "persona", "properties", "perplexity"]
    heading: str | Callable[[str], str]  # a function of the score's signature where the settings decide it
    show: str = ""  # format of the number, where it is not the metric's own
    interval: bool = False  # whether the 95% interval is shown beside the score


@dataclass(frozen=True)
class Metric:
    """One score.

    Either `statistics` and `score` make it, and then it has an interval, or `overall` makes it from all responses at
    once, and it has none.

    Attributes:
        name: its key in metrics.json. GROUP.UNIT is the key UNIT within GROUP.
        label: what people call it.
        statistics: K numbers per reply, whose sums over replies decide the score.
        score: from sums of shape (B, K) to B scores. `metrics.ratio` and its relatives divide the first sum by the
            second, so that the score is a mean over replies (or over tokens, words, bytes).
        overall: the score of all responses, where it is no function of sums.
        needs: fields of `Reply` that a row must have.
        english: it is another form of an English score, and says nothing elsewhere.
        range: least and greatest value.
        better: which direction is better; empty where neither is.
        show: format of the number in tables.
        signature: of the score; it has a place in metrics.json beside the score.
        details: what else metrics.json says of it, from the replies and the sums of shape (K,).
        headline: compared with the best trivial system, judged in words, and plotted. Needs a signature.
        tested: paired tests compare the scored files in it.
        spread: the tables of the spread over seeds and over orders of the persona show it.
        columns: where the tables of systems show it.
        legend: explains its columns.
        flag: words that mark a reply, in the report, for which the first statistic is not 0.
        hub_type: the Hub's name of the metric, where the model card's metadata hold it.
    """

    name: str
    label: str
    statistics: Callable[[Answers], Rows] | None = None
    score: Callable[[Array], Array] = metrics.ratio
    overall: Callable[[Iterable[str], Units], float] | None = None
    needs: tuple[str, ...] = ()
    english: bool = False
    range: tuple[float, float] = (0, 1)
    better: Literal["higher", "lower", ""] = ""
    show: str = ",.2f"
    signature: Callable[[Choices], str] | None = None
    details: Callable[[Sequence[Reply], Array], dict[str, Any]] | None = None
    headline: bool = False
    tested: bool = False
    spread: bool = False
    columns: tuple[Column, ...] = ()
    legend: str = ""
    flag: str = ""
    hub_type: str = ""

    def advantage(self, first: float, second: float) -> float:
        """By how much `first` is better than `second`; negative where it is worse."""
        return second - first if self.better == "lower" else first - second

    def clipped(self, interval: list[float] | None) -> list[float] | None:
        """An interval without values that the score cannot have."""
        return interval and [min(max(end, self.range[0]), self.range[1]) for end in interval]

    def write(self, entry: dict[str, Any], value: float, interval: list[float] | None, details: dict[str, Any]) -> None:
        """Puts the score into a system's part of metrics.json."""
        group, _, unit = self.name.partition(".")
        if self.signature:
            entry[self.name] = {"score": value, "ci95": interval} | details
        elif unit:
            entry.setdefault(group, {"ci95": {}})[unit] = value if math.isfinite(value) else None
            entry[group]["ci95"][unit] = interval
        elif math.isfinite(value):
            entry[self.name] = value
            entry |= {f"{self.name}_{key}": detail for key, detail in details.items()}
            if self.statistics:
                entry["ci95"][self.name] = interval

    def read(self, entry: Mapping[str, Any]) -> tuple[float | None, list[float] | None]:
        """Score and interval from a system's part of metrics.json; None where it has none."""
        group, _, unit = self.name.partition(".")
        if self.signature:
            found = entry.get(self.name, {})
            return found.get("score"), found.get("ci95")
        if unit:
            found = entry.get(group, {"ci95": {}})
            return found.get(unit), found["ci95"].get(unit)
        return entry.get(self.name), entry["ci95"].get(self.name)

    def signature_in(self, entry: Mapping[str, Any]) -> str:
        """From a system's part of metrics.json; the legend, which is fixed, where the score has no signature."""
        return str(entry.get(self.name, {}).get("signature", "")) if self.signature else self.legend


def _tokenizer_in(signature: str) -> str:
    """` (NAME)` of sacreBLEU's tokenizer in its signature, where it is not the usual one."""
    name = next(part for part in signature.split("|") if part.startswith("tok:")).removeprefix("tok:")
    return "" if name == "13a" else f" ({name})"


_percent = partial(Metric, show=".1%")
_points = partial(Metric, score=metrics.points, range=(0, 100), better="higher")
_bleu = partial(_points, score=metrics.bleu, details=metrics.bleu_details)
_ranking = partial(Metric, needs=("reference_nll", "candidate_nll"), better="higher", show=".1%")
_perplexity = partial(Metric, score=metrics.perplexity, needs=("reference_nll",), range=(0, math.inf), better="lower")

METRICS: tuple[Metric, ...] = (
    _bleu(
        "bleu", "BLEU", lambda answers: answers.bleu_rows, headline=True, tested=True, spread=True, hub_type="bleu",
        signature=metrics.bleu_signature,
        columns=(Column("scores", lambda signature: f"BLEU{_tokenizer_in(signature)}", interval=True),),
    ),
    _points(
        "rouge_l", "ROUGE-L", metrics.rouge_statistics, headline=True, tested=True, spread=True, hub_type="rouge",
        signature=metrics.rouge_signature,
        columns=(Column("scores", "ROUGE-L", interval=True),),
    ),
    _points(
        "f1", "F1", metrics.f1_statistics, headline=True, tested=True, spread=True, hub_type="f1",
        signature=metrics.f1_signature,
        columns=(Column("scores", "F1", interval=True),),
    ),
    _bleu(
        "bleu_lc", "BLEU lower-cased", lambda answers: answers.bleu_rows_lowercase,
        signature=partial(metrics.bleu_signature, lowercase=True),
        columns=(Column("properties", "BLEU-lc"),), legend="lower-cased BLEU",
    ),
    _points(
        "rouge_l_other", "ROUGE-L, other stemmer choice", partial(metrics.rouge_statistics, other=True),
        signature=partial(metrics.rouge_signature, other=True), english=True,
        columns=(Column("properties", lambda signature: "R-L stem" if "stemmer:yes" in signature else "R-L plain"),),
        legend="ROUGE-L with the other stemmer choice",
    ),
    _perplexity(
        "perplexity.token", "perplexity per token", metrics.nll_per(lambda reply, _: reply.reference_tokens or 0),
        spread=True, hub_type="perplexity", legend="per reply token, end included",
        columns=(Column("scores", "PPL", show=",.1f"), Column("perplexity", "per token", interval=True)),
    ),
    _perplexity(
        "perplexity.word", "perplexity per word", metrics.nll_per(lambda reply, units: units.count(reply.reference)),
        columns=(Column("perplexity", "per word", interval=True),),
    ),
    _perplexity(  # the only unit that compares across tokenizers
        "perplexity.bits_per_byte", "bits per byte", metrics.nll_per(lambda reply, _: len(reply.reference.encode())),
        score=metrics.bits, tested=True,
        columns=(Column("perplexity", "bits per byte", interval=True),),
    ),
    _ranking(
        "hits_at_1", "hits@1", metrics.hits_at(1), details=metrics.hit_details, tested=True, spread=True,
        columns=(Column("scores", "hits@1"), Column("ranking", "hits@1", interval=True)),
    ),
    *(
        _ranking(f"hits_at_{k}", f"hits@{k}", metrics.hits_at(k), columns=(Column("ranking", f"hits@{k}"),))
        for k in (3, 5, 10)
    ),
    _ranking(
        "mrr", "mean reciprocal rank", metrics.reciprocal_rank, show=",.3f", columns=(Column("ranking", "MRR", interval=True),),
        legend="mean of 1 / rank of the reference",
    ),
    _points(
        "persona_f1", "persona F1", persona.persona_f1, needs=("persona",), spread=True,
        columns=(Column("persona", "P-F1", interval=True),), legend="words shared with the persona, rare ones count more",
    ),
    _points(
        "persona_recall", "persona recall", persona.persona_recall, needs=("persona",),
        columns=(Column("persona", "P-rec"),), legend="the persona's words in the response, rare ones count more",
    ),
    Metric(
        "persona_coverage", "persona coverage", persona.persona_coverage, needs=("persona",), better="higher", show=",.3f",
        columns=(Column("persona", "P-Cover"),), legend="mean weight of the words shared with the closest sentence",
    ),
    Metric(
        "persona_gain", "persona likelihood gain", persona.persona_gain, needs=("reference_nll", "other_persona_nll"),
        range=(-math.inf, math.inf), better="higher", show="+,.3f", spread=True,
        columns=(Column("persona", "gain", interval=True),),
        legend="nats per token by which the reference is likelier with its persona than with another dialogue's",
    ),
    _percent(
        "swap_accuracy", "swap accuracy", persona.swap_accuracy, needs=("reference_nll", "other_persona_nll"),
        better="higher", details=persona.swap_details, columns=(Column("persona", "swap"),),
        legend="references that are likelier with their persona than with every other one that was tried",
    ),
    Metric(
        "consistency", "C.Score", persona.consistency, needs=("nli",), range=(-math.inf, math.inf), better="higher",
        show="+,.3f", spread=True, columns=(Column("persona", "C.Score", interval=True),),
        legend="sentences of the persona that a response entails less those that it contradicts",
    ),
    _percent(
        "contradiction", "share that contradicts the persona", persona.contradiction, needs=("nli",), better="lower",
        spread=True, flag="contradicts the persona", columns=(Column("persona", "contra"),),
        legend="responses that contradict a sentence of the persona",
    ),
    _percent(
        "self_repetition", "self-repetition", persona.self_repetition, better="lower", columns=(Column("persona", "repeats"),),
        legend="bigrams that the system has used before in the dialogue",
    ),
    _percent(
        "questions", "share with a question", metrics.mean_of(persona.is_question), columns=(Column("persona", "asks"),),
        legend="responses with a question mark",
    ),
    Metric(
        "distinct_1", "distinct-1", overall=lambda texts, units: metrics.distinct(texts, 1, units), show=",.3f",
        columns=(Column("properties", "dist-1"),), legend="different n-grams over all n-grams",
    ),
    Metric(
        "distinct_2", "distinct-2", overall=lambda texts, units: metrics.distinct(texts, 2, units), show=",.3f",
        columns=(Column("properties", "dist-2"),), legend="different n-grams over all n-grams",
    ),
    Metric(
        "length_ratio", "length ratio", lambda answers: answers.bleu_rows, range=(0, math.inf),
        columns=(Column("properties", "length"),), legend="words of the responses over words of the references",
    ),
    _percent(
        "stopped_by_eos", "share stopped by EOS", metrics.mean_of(lambda reply: reply.stopped_by == "eos"),
        needs=("stopped_by",), better="higher",
        columns=(Column("properties", "EOS"),), legend="stopped by the end-of-text token",
    ),
    _percent(
        "empty", "share of empty replies", metrics.mean_of(lambda reply: not reply.response.strip()), better="lower",
        flag="empty",
        columns=(Column("properties", "empty"),), legend="responses without text",
    ),
    _percent(
        "speaker_tag", "share with a speaker tag", metrics.mean_of(lambda reply: bool(metrics.SPEAKER_TAG.search(reply.response))),
        better="lower", flag="speaker tag", columns=(Column("properties", "tags"),), legend="responses that contain a speaker tag",
    ),
    _percent(
        "copied_persona", "share copied from the persona",
        metrics.copies_of(lambda reply: reply.persona or ()), needs=("persona",),
        better="lower", flag="copies persona", columns=(Column("properties", "cp.pers"),),
        legend="responses that are a persona sentence, punctuation and articles aside",
    ),
    _percent(
        "copied_history", "share copied from the history",
        metrics.copies_of(lambda reply: (turn.text for turn in reply.history or ())),
        needs=("history",), better="lower", flag="copies history", columns=(Column("properties", "cp.hist"),),
        legend="responses that are an earlier turn, punctuation and articles aside",
    ),
    Metric(
        "response_tokens", "response length in the model's tokens",
        metrics.mean_of(lambda reply: reply.response_tokens or 0), needs=("response_tokens",), range=(0, math.inf),
    ),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}
HEADLINES = tuple(metric for metric in METRICS if metric.headline)
DETAILED = BY_NAME["rouge_l"]  # shown for single replies and for groups of them: the mean of a number per reply
