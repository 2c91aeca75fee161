"""The dialogues that can be read in the report: the best and worst by each score, where systems differ, and a sample."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kestrel.dialogue import Turn
from kestrel.evaluation.metric_table import DETAILED, METRICS, Metric
from kestrel.evaluation.metrics import Answers, References
from kestrel.evaluation.persona import common_words, words_of, words_of_persona
from kestrel.evaluation.resampling import Array
from kestrel.evaluation.scoring import Evaluation
from kestrel.evaluation.systems import System
from kestrel.evaluation.units import Units, boundaries


@dataclass(frozen=True)
class Response:
    """What one system answered.

    Attributes:
        pieces: its text in pieces; whether each is a word that the persona has, and few replies have.
        score: of the metric `DETAILED`.
        flags: words to filter by.
    """

    system: str
    text: str
    pieces: tuple[tuple[str, bool], ...]
    score: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Exchange:
    """One reply: the turns since the one before, the reference, whole and in pieces, and each system's response."""

    turns: tuple[Turn, ...]
    reference: str
    pieces: tuple[tuple[str, bool], ...]
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class SampleDialogue:
    dialogue_id: str
    place: int  # in the files, from 0
    chosen: str  # why it is in the sample: extreme in some score, or random
    persona: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]]  # by metric and system; only finite ones
    exchanges: tuple[Exchange, ...]

    @property
    def flags(self) -> list[str]:
        return sorted({flag for e in self.exchanges for response in e.responses for flag in response.flags})


def sortable_metrics(evaluation: Evaluation) -> list[Metric]:
    """Scores of which every shown system has one for a single dialogue; `DETAILED` is the first."""
    shown = [evaluation.systems[name] for name in evaluation.of_kind("system", "base")]
    if any(len(system.sums[DETAILED.name]) != evaluation.metrics["n_dialogues"] for system in shown):
        return [DETAILED]  # there are so many dialogues that their sums were not kept one by one
    found = [m for m in METRICS if m.better and m.statistics and all(m.name in system.sums for system in shown)]
    return sorted(found, key=lambda metric: metric is not DETAILED)


def sample_dialogues(evaluation: Evaluation, count: int, seed: int) -> list[SampleDialogue]:
    """At most `count` dialogues, by falling score of the first system.

    Where there are more, two thirds are extreme: by each score in turn the best and the worst of the first system, and
    where it is furthest ahead of the others' mean and behind it. The others are drawn at random, so that the sample is
    not made of extremes alone.
    """
    shown = evaluation.of_kind("system", "base")
    members: dict[str, list[int]] = {}
    for i, reply in enumerate(evaluation.systems["gold"].replies):
        members.setdefault(reply.dialogue_id, []).append(i)
    metrics = sortable_metrics(evaluation)
    scores = {
        metric.name: {system: _by_dialogue(metric, evaluation.systems[system], members) for system in shown}
        for metric in metrics
    }
    names = np.array(list(members), dtype=object)
    chosen = dict.fromkeys(names, "random")
    if len(names) > count:
        ranked: list[list[str]] = []
        for values in scores.values():
            first, *others = (values[name] for name in shown)
            for key in (first, first - np.mean(others, axis=0)) if others else (first,):
                order = names[np.argsort(np.nan_to_num(key), kind="stable")]
                ranked += [list(order[::-1]), list(order)]
        extreme = dict.fromkeys(name for rank in zip(*ranked, strict=True) for name in rank)
        chosen = dict.fromkeys(list(extreme)[: 2 * count // 3], "extreme")
        others = [name for name in names if name not in chosen]
        chosen |= dict.fromkeys(random.Random(seed).sample(others, count - len(chosen)), "random")
    common = common_words(evaluation.choices.rarity)
    places = {name: place for place, name in enumerate(members)}
    leading = scores[DETAILED.name][shown[0]]
    return [
        _dialogue(evaluation, name, members[name], places[name], chosen[name], scores, common)
        for name in sorted(chosen, key=lambda name: -leading[places[name]])
    ]


def _by_dialogue(metric: Metric, system: System, members: Mapping[str, list[int]]) -> Array:
    """One system's score of each dialogue."""
    if metric is DETAILED:
        return np.array([100 * system.detail[indices].mean() for indices in members.values()])
    return metric.score(system.sums[metric.name])


def _dialogue(
    evaluation: Evaluation,
    name: str,
    indices: Sequence[int],
    place: int,
    chosen: str,
    scores: Mapping[str, Mapping[str, Array]],
    common: frozenset[str],
) -> SampleDialogue:
    contexts = evaluation.systems["gold"].replies
    persona = contexts[indices[0]].persona or ()
    units = evaluation.choices.units
    known = words_of_persona(persona, units) - common
    exchanges, seen = [], 0
    for i in indices:
        history = contexts[i].history or ()
        turns = history[seen if len(history) >= seen else 0 :]
        seen = len(history) + 1
        responses = tuple(_response(evaluation, system, i, known) for system in evaluation.of_kind("system", "base"))
        exchanges.append(
            Exchange(turns, contexts[i].reference, _pieces(contexts[i].reference, known, units), responses)
        )
    own = {
        metric: {system: float(values[place]) for system, values in by_system.items() if np.isfinite(values[place])}
        for metric, by_system in scores.items()
    }
    return SampleDialogue(name, place, chosen, persona, own, tuple(exchanges))


def _response(evaluation: Evaluation, system: str, i: int, known: frozenset[str]) -> Response:
    chosen = evaluation.systems[system]
    reply = chosen.replies[i]
    answers = Answers([reply], References([reply], evaluation.choices))
    flagged = [m for m in METRICS if m.flag and m.statistics and m.name in chosen.sums]
    flags = [m.flag for m in flagged if m.statistics and m.statistics(answers)[0][0]]
    if reply.stopped_by == "length":
        flags.append("cut by length")
    score = float(100 * chosen.detail[i])
    return Response(
        system, reply.response, _pieces(reply.response, known, evaluation.choices.units), score, tuple(flags)
    )


def _pieces(text: str, known: frozenset[str], units: Units) -> tuple[tuple[str, bool], ...]:
    pieces = re.split(r"([\w'’-]+)", text) if units.english else boundaries(text)
    return tuple((piece, bool(words_of(piece, units) & known)) for piece in pieces if piece)
