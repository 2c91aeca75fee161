"""The rows of the table: files, systems that need no model, and the references themselves, with the sums of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

import numpy as np

from kestrel.evaluation.generations import Generations, Reply
from kestrel.evaluation.metric_table import BY_NAME, DETAILED, METRICS, Metric
from kestrel.evaluation.metrics import Answers, Choices, References
from kestrel.evaluation.resampling import Array, Dialogues

_CHUNK = 8192  # replies whose n-grams are in memory at once


class Answered(Sequence[Reply]):
    """Contexts with responses that no model gave: their rows are made when they are asked for."""

    def __init__(self, contexts: Sequence[Reply], responses: Sequence[str]) -> None:
        self.contexts, self.responses = contexts, responses

    def __len__(self) -> int:
        return len(self.contexts)

    @overload
    def __getitem__(self, place: int) -> Reply: ...

    @overload
    def __getitem__(self, place: slice) -> Answered: ...

    def __getitem__(self, place: int | slice) -> Reply | Answered:
        if isinstance(place, slice):
            return Answered(self.contexts[place], self.responses[place])
        return self.contexts[place].with_response(self.responses[place])


@dataclass
class System:
    """One row of the table: what gave N replies.

    Attributes:
        kind: system (a file), base (a file of the untuned model), trivial, or gold (the references).
        made_by: the file, or how the replies were made.
        folder: of the file, so that a system meets the base of its own run first.
        group: what files of several seeds of one system share.
        sums: of the statistics by metric, over the replies of each of D dialogues, shape (D, K).
        totals: of the same, shape (K,).
        point: the score by metric.
        detail: the metric `DETAILED` of each reply, 0 to 1, shape (N,).
    """

    kind: Literal["system", "base", "trivial", "gold"]
    made_by: str
    replies: Sequence[Reply]
    folder: Path | None = None
    group: str = ""
    sums: dict[str, Array] = field(default_factory=dict)
    totals: dict[str, Array] = field(default_factory=dict)
    point: dict[str, float] = field(default_factory=dict)
    detail: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def is_file(self) -> bool:
        return self.kind in ("system", "base")

    @property
    def responses(self) -> Sequence[str]:
        replies = self.replies
        return replies.responses if isinstance(replies, Answered) else [reply.response for reply in replies]

    def metrics(self, choices: Choices) -> list[Metric]:
        """Those that sums of statistics make, and for which some reply has what they need."""
        return [
            metric
            for metric in METRICS
            if metric.statistics and (choices.units.english or not metric.english) and self._has(metric.needs)
        ]

    def _has(self, fields: Sequence[str]) -> bool:
        if isinstance(self.replies, Answered) and set(fields) - {"persona", "history"}:
            return False  # as it is for every reply, which need not be made to see it
        return not fields or any(all(getattr(row, key) is not None for key in fields) for row in self.replies)


def system_of(file: Generations) -> System:
    kind: Literal["base", "system"] = "base" if file.group == "base" else "system"
    return System(kind, str(file.path), file.replies, file.path.resolve().parent, file.seed_group)


def score(systems: Mapping[str, System], dialogues: Dialogues, choices: Choices) -> None:
    """Fills in the sums and scores of systems that all answer the same contexts.

    Replies are scored some dialogues at a time, and their references once for all systems, so that n-grams do not pile up.
    """
    contexts = next(iter(systems.values())).replies
    metrics = {name: system.metrics(choices) for name, system in systems.items()}
    for system in systems.values():
        system.detail = np.zeros(len(contexts))
    for places in dialogues.parts(_CHUNK):
        references = References([contexts[place] for place in places], choices)
        for name, system in systems.items():
            answers = Answers([system.replies[place] for place in places], references)
            for metric in metrics[name]:
                assert metric.statistics is not None
                rows = np.array(metric.statistics(answers), dtype=np.float64)
                system.sums[metric.name] = system.sums.get(metric.name, 0) + dialogues.sums(rows, places)
                system.totals[metric.name] = system.totals.get(metric.name, 0) + total(rows)
                if metric is DETAILED:
                    system.detail[places] = rows[:, 0]
    for system in systems.values():
        system.point = {key: float(BY_NAME[key].score(sums[None])[0]) for key, sums in system.totals.items()}


def statistics_of(system: System, choices: Choices) -> dict[str, Array]:
    """Statistics of each reply by metric, shape (N, K)."""
    answers = Answers(system.replies, References(system.replies, choices))
    fitting = [metric for metric in system.metrics(choices) if metric.statistics]
    return {m.name: np.array(m.statistics(answers), dtype=np.float64) for m in fitting if m.statistics}


def total(statistics: Array) -> Array:
    """Sums of shape (K,), each over a column of its own: numpy adds those in pairs, so that little is lost."""
    return np.array([np.ascontiguousarray(column).sum() for column in statistics.T])
