"""How sure the scores are: a bootstrap over whole dialogues, and a paired test of two systems on the same replies.

Replies of one dialogue share persona, topic and partner, so they are not independent. Dialogues are therefore what is
resampled (cluster bootstrap; Koehn 2004 for BLEU and for the paired comparison, Field and Welsh 2007 for clusters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kestrel.evaluation.metric_table import BY_NAME
from kestrel.evaluation.metrics import Array

Key = TypeVar("Key")
PAIRED_TEST = "paired cluster bootstrap over dialogues, shifted to no difference, two-sided"
_CHUNK = 64  # resamples drawn at once: the counts of one chunk are _CHUNK x dialogues


def resampled_sums(
    statistics: Mapping[Key, Array], dialogues: Sequence[str], resamples: int, seed: int
) -> dict[Key, Array]:
    """Sums of statistics over dialogues drawn with replacement, shape (B, K).

    Args:
        statistics: arrays of shape (N, K), a row per reply; K may differ. All are resampled alike, so that differences
            between systems are paired.
        dialogues: those of the N replies.
        resamples: B.
    """
    names, members = np.unique(np.asarray(dialogues, dtype=object).astype(str), return_inverse=True)
    count = len(names)
    joined = np.concatenate(list(statistics.values()), axis=1)
    clusters = np.zeros((count, joined.shape[1]))
    np.add.at(clusters, members, joined)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, joined.shape[1]))
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        picks = generator.multinomial(count, np.full(count, 1 / count), size=rows)
        sums[start : start + rows] = picks.astype(np.float64) @ clusters
    ends = np.cumsum([array.shape[1] for array in statistics.values()])[:-1]
    return dict(zip(statistics, np.split(sums, ends, axis=1), strict=True))


class Bootstrap:
    """The scores of several systems on the same replies, and on B resamples of their dialogues.

    Args:
        systems: statistics of N replies by system and metric, each of shape (N, K).
        dialogues, resamples, seed: of `resampled_sums`.

    Attributes:
        point: score by system and metric.
        draws: the same on the resamples, arrays of shape (B,).
    """

    def __init__(
        self, systems: Mapping[str, Mapping[str, Array]], dialogues: Sequence[str], resamples: int, seed: int
    ) -> None:
        self._dialogues, self._resamples, self._seed = dialogues, resamples, seed
        self._several = len(set(dialogues)) > 1
        sums = self.sums({(system, name): array for system in systems for name, array in systems[system].items()})
        self.draws: dict[str, dict[str, Array]] = {system: {} for system in systems}
        for (system, name), resampled in sums.items():
            self.draws[system][name] = BY_NAME[name].score(resampled)
        self.point = {system: point_scores(statistics) for system, statistics in systems.items()}

    def sums(self, statistics: Mapping[Key, Array]) -> dict[Key, Array]:
        """Resampled sums of any statistics, from the same draws."""
        return resampled_sums(statistics, self._dialogues, self._resamples, self._seed)

    def interval(self, draws: Array) -> list[float] | None:
        """95% percentile interval of B draws; None where one dialogue, or a draw that is not finite, gives none."""
        if not self._several or not np.isfinite(draws).all():
            return None
        low, high = np.percentile(draws, [2.5, 97.5])
        return [float(low), float(high)]

    def paired(self, system: str, against: str, metric: str) -> dict[str, Any]:
        """The difference `system` - `against` in one metric, its 95% interval, and the p-value of `PAIRED_TEST`.

        The p-value is the share of resamples whose difference is at least as far from the observed difference as the
        observed one is from zero, the observed sample counted with them: never below 1 / (B + 1).
        """
        difference = self.point[system][metric] - self.point[against][metric]
        draws = self.draws[system][metric] - self.draws[against][metric]
        interval = self.interval(draws)
        beyond = int((np.abs(draws - difference) >= abs(difference)).sum())
        return {
            "system": system,
            "against": against,
            "metric": metric,
            "difference": difference,
            "ci95": interval,
            "p_value": None if interval is None else (beyond + 1) / (len(draws) + 1),
        }


def point_scores(statistics: Mapping[str, Array]) -> dict[str, float]:
    """Every score of one system on all replies, from the statistics of each."""
    return {name: float(BY_NAME[name].score(total(array)[None])[0]) for name, array in statistics.items()}


def total(statistics: Array) -> Array:
    """Sums of shape (K,), each over a column of its own: numpy adds those in pairs, so that little is lost."""
    return np.array([np.ascontiguousarray(column).sum() for column in statistics.T])
