"""How sure the scores are: a bootstrap over whole dialogues, and a paired test of two systems on the same replies.

Replies of one dialogue share persona, topic and partner, so they are not independent; dialogues are what is resampled
(cluster bootstrap; Koehn 2004 for BLEU and for the paired comparison, Field and Welsh 2007 for clusters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kestrel.evaluation.metrics import Array, scores

Key = TypeVar("Key")
PAIRED_TEST = "paired cluster bootstrap over dialogues, shifted to no difference, two-sided"
_CHUNK = 64  # resamples drawn at once: the counts of one chunk are _CHUNK x dialogues


def resampled_sums(
    columns: Mapping[Key, Array], dialogues: Sequence[str], resamples: int, seed: int
) -> dict[Key, Array]:
    """Sums of each column over dialogues drawn with replacement.

    Args:
        columns: arrays of shape (N,), one value a reply. All columns are resampled alike, so that differences between
            systems are paired.
        dialogues: the N replies' dialogues; D different ones.
        resamples: B.

    Returns:
        Arrays of shape (B,).
    """
    names, members = np.unique(np.asarray(dialogues, dtype=object).astype(str), return_inverse=True)
    count = len(names)
    clusters = np.zeros((count, len(columns)))
    np.add.at(clusters, members, np.stack(list(columns.values()), axis=1))
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, len(columns)))
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        picks = generator.multinomial(count, np.full(count, 1 / count), size=rows)
        sums[start : start + rows] = picks.astype(np.float64) @ clusters
    return {name: sums[:, j] for j, name in enumerate(columns)}


class Bootstrap:
    """The scores of several systems on the same replies, and on B resamples of their dialogues.

    Args:
        systems: columns of `reply_statistics` by system, each of shape (N,).
        dialogues: the N replies' dialogues.
        resamples: B.
        seed: of the draws.

    Attributes:
        point: score by system and name.
        draws: the same on the resamples, arrays of shape (B,).
    """

    def __init__(
        self, systems: Mapping[str, Mapping[str, Array]], dialogues: Sequence[str], resamples: int, seed: int
    ) -> None:
        self._dialogues, self._resamples, self._seed = dialogues, resamples, seed
        self.enough = len(set(dialogues)) > 1
        joined = {(system, name): column for system, columns in systems.items() for name, column in columns.items()}
        drawn = self.sums(joined)
        sums = {system: {name: drawn[system, name] for name in columns} for system, columns in systems.items()}
        self.draws = {system: scores(columns) for system, columns in sums.items()}
        self.point = {system: point_scores(columns) for system, columns in systems.items()}

    def sums(self, columns: Mapping[Key, Array]) -> dict[Key, Array]:
        """Resampled sums of further columns, from the same draws."""
        return resampled_sums(columns, self._dialogues, self._resamples, self._seed)

    def interval(self, system: str, metric: str) -> list[float] | None:
        """95% percentile interval, or None where a single dialogue gives none."""
        return self.interval_of(self.draws[system][metric])

    def interval_of(self, draws: Array) -> list[float] | None:
        """The same of any statistic's draws, shape (B,)."""
        if not self.enough or not np.isfinite(draws).all():
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
        beyond = int((np.abs(draws - difference) >= abs(difference)).sum())
        return {
            "system": system,
            "against": against,
            "metric": metric,
            "difference": difference,
            "ci95": self.interval_of(draws),
            "p_value": (beyond + 1) / (len(draws) + 1) if self.enough and np.isfinite(draws).all() else None,
        }


def point_scores(columns: Mapping[str, Array]) -> dict[str, float]:
    """Every score of one system on all replies, from columns of `reply_statistics`."""
    totals = {name: column.sum(keepdims=True) for name, column in columns.items()}
    return {name: float(value[0]) for name, value in scores(totals).items()}
