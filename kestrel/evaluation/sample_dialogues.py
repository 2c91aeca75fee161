"""The dialogues that can be read in the report: the best, the worst, and some drawn at random."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kestrel.dialogue import Turn
from kestrel.evaluation.metric_table import DETAILED, METRICS
from kestrel.evaluation.scoring import Evaluation


@dataclass(frozen=True)
class Response:
    """What one system answered. `score` is that of the metric `DETAILED`; `flags` are words to filter by."""

    system: str
    text: str
    score: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Exchange:
    """One reply: the turns since the one before, the reference, and each system's response."""

    turns: tuple[Turn, ...]
    reference: str
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class SampleDialogue:
    dialogue_id: str
    place: int  # in the files, from 0
    chosen: str  # why it is in the sample: best, worst or random
    persona: tuple[str, ...]
    scores: Mapping[str, float]  # mean of its replies' scores, by system
    exchanges: tuple[Exchange, ...]

    @property
    def flags(self) -> list[str]:
        return sorted({flag for e in self.exchanges for response in e.responses for flag in response.flags})


def sample_dialogues(evaluation: Evaluation, count: int, seed: int) -> list[SampleDialogue]:
    """At most `count` dialogues, by falling score of the first system.

    Where there are more, a third of them are the best, a third the worst, and the others are drawn at random, so that
    the sample is not made of extremes alone.
    """
    members: dict[str, list[int]] = {}
    first = next(iter(evaluation.systems.values()))
    for i, reply in enumerate(first.replies):
        members.setdefault(reply.dialogue_id, []).append(i)
    scores = first.statistics[DETAILED.name][:, 0]
    ranked = sorted(members, key=lambda name: float(scores[members[name]].mean()), reverse=True)
    if len(ranked) <= count:
        chosen = dict.fromkeys(ranked, "random")
    else:
        third = count // 3
        best, worst, middle = ranked[:third], ranked[len(ranked) - third :], ranked[third : len(ranked) - third]
        drawn = random.Random(seed).sample(middle, count - 2 * third)
        chosen = dict.fromkeys(best, "best") | dict.fromkeys(drawn, "random") | dict.fromkeys(worst, "worst")
    places = {name: place for place, name in enumerate(members)}
    return [_dialogue(evaluation, name, members[name], places[name], chosen[name]) for name in ranked if name in chosen]


def _dialogue(evaluation: Evaluation, name: str, indices: Sequence[int], place: int, chosen: str) -> SampleDialogue:
    shown = evaluation.of_kind("system", "base")
    contexts = evaluation.systems["gold"].replies
    exchanges, seen = [], 0
    for i in indices:
        history = contexts[i].history or ()
        turns = history[seen if len(history) >= seen else 0 :]
        seen = len(history) + 1
        responses = tuple(_response(evaluation, system, i) for system in shown)
        exchanges.append(Exchange(turns, contexts[i].reference, responses))
    scores = {s: float(100 * evaluation.systems[s].statistics[DETAILED.name][list(indices), 0].mean()) for s in shown}
    return SampleDialogue(name, place, chosen, contexts[indices[0]].persona or (), scores, tuple(exchanges))


def _response(evaluation: Evaluation, system: str, i: int) -> Response:
    reply, statistics = evaluation.systems[system].replies[i], evaluation.systems[system].statistics
    flags = [m.flag for m in METRICS if m.flag and m.name in statistics and statistics[m.name][i, 0]]
    if reply.stopped_by == "length":
        flags.append("cut by length")
    return Response(system, reply.response, float(100 * statistics[DETAILED.name][i, 0]), tuple(flags))
