"""How sure the scores are: the interval of each, and tests of two systems on the same replies.

Replies of one dialogue share persona, topic and partner, so they are not independent. Whole dialogues are therefore what
is drawn and exchanged (Field and Welsh 2007). Both methods hold for few dialogues, as `benchmarks/significance.py` shows:

- intervals: studentized bootstrap (Efron and Tibshirani 1993, chapter 12) of the jackknife's pseudo-values, that of a
  difference with equal distances on both sides (Hall 1988): alike systems differ about as far in either direction;
- tests: the dialogues of two systems are exchanged at random (Noreen 1989; Yeh 2000 for BLEU), which for a mean is to
  flip the sign of a dialogue's difference. Up to 14 dialogues, all exchanges are made, and the p-value is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Score = Callable[[Array], Array]  # from sums of shape (B, K) to B scores
Key = TypeVar("Key")

FEWEST = 6  # dialogues; with fewer, no difference can have p < 0.05, and no interval holds
EXCHANGES = 10_000  # drawn where not all are made
_EXACT = 14  # dialogues up to which all exchanges are made
_MOST = 10_000  # dialogues that are drawn one by one; more of them are drawn in this many groups
_CHUNK = 1 << 21  # weights drawn at once
TEST = "exchange of dialogues between the two systems, two-sided"


class Dialogues:
    """Which dialogue each of N replies belongs to, and the draws of these dialogues.

    Args:
        ids: of the replies' dialogues.
        resamples: of the bootstrap.

    Attributes:
        count: different dialogues.
        groups: of dialogues, D; each dialogue is one unless there are more than `_MOST`.
    """

    def __init__(self, ids: Sequence[str], resamples: int, seed: int) -> None:
        numbers: dict[str, int] = {}
        members = np.fromiter((numbers.setdefault(name, len(numbers)) for name in ids), np.int64, len(ids))
        self.count = len(numbers)
        self.groups = min(self.count, _MOST)
        self.members = (
            np.random.default_rng(seed).permutation(self.count)[members] % _MOST if self.count > _MOST else members
        )
        self._resamples, self._seed = resamples, seed

    def parts(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Places of replies, at least `size` at a time where so many are left, and with each dialogue whole."""
        if len(self.members) <= size:
            yield np.arange(len(self.members))
            return
        order = np.argsort(self.members, kind="stable")
        ends = np.flatnonzero(np.diff(self.members[order], append=-1)) + 1  # of dialogues
        start = 0
        while start < len(order):
            end = ends[min(int(np.searchsorted(ends, start + size)), len(ends) - 1)]
            yield order[start:end]
            start = end

    def sums(self, statistics: Array, places: NDArray[np.int64] | None = None) -> Array:
        """Sums over the replies of each dialogue, shape (D, K); of some places, or of all replies."""
        sums = np.zeros((self.groups, statistics.shape[1]))
        np.add.at(sums, self.members if places is None else self.members[places], statistics)
        return sums

    def intervals(
        self, pseudo: Mapping[Key, Array], points: Mapping[Key, float], symmetric: bool = False
    ) -> dict[Key, list[float] | None]:
        """95% intervals of scores; None where there are too few dialogues, or a score is not finite without one of them.

        Args:
            pseudo: `pseudo_values` by key, shape (D,); of a difference, their differences.
            points: the score by key.
            symmetric: around the score, as fits a difference; else each end has half of the error.
        """
        intervals: dict[Key, list[float] | None] = dict.fromkeys(pseudo)
        keys = [key for key, values in pseudo.items() if np.isfinite(values).all() and np.isfinite(points[key])]
        if self.count < FEWEST or not keys:
            return intervals
        values = np.stack([pseudo[key] for key in keys], axis=1)
        deviations = values - values.mean(axis=0)
        generator, count = np.random.default_rng(self._seed), self.groups
        drawn = _drawn(
            lambda rows: draw_with_replacement(generator, rows, count),
            np.concatenate([deviations, deviations**2], axis=1), self._resamples,
        ) / count  # fmt: skip
        means, squares = np.split(drawn, 2, axis=1)
        spread = np.sqrt(np.maximum(squares - means**2, 0) / (count - 1))
        error = np.sqrt((deviations**2).mean(axis=0) / (count - 1))
        for column, key in enumerate(keys):
            varied = spread[:, column] > 1e-9 * error[column]  # a resample of equal dialogues has no error of its own
            ratios = means[varied, column] / spread[varied, column] if varied.any() else np.zeros(1)
            if symmetric:
                high = np.quantile(np.abs(ratios), 0.95)
                low = -high
            else:
                low, high = np.quantile(ratios, [0.025, 0.975])
            intervals[key] = [float(points[key] - high * error[column]), float(points[key] - low * error[column])]
        return intervals

    def p_values(
        self, pairs: Mapping[Key, tuple[Array, Array, Score]], exchanges: int = EXCHANGES
    ) -> dict[Key, float | None]:
        """Two-sided p-values of the differences of pairs, by exchanging their dialogues; None with too few dialogues.

        Args:
            pairs: sums over dialogues of both systems, shapes (D, K), and the score of such sums.
            exchanges: drawn where there are too many to make them all.
        """
        if self.count < FEWEST or not pairs:
            return dict.fromkeys(pairs)
        exact = self.groups <= _EXACT
        count = 2**self.groups if exact else exchanges
        generator, made = np.random.default_rng(self._seed), iter(range(count))

        def weights(rows: int) -> NDArray[Any]:
            if not exact:
                return generator.integers(0, 2, size=(rows, self.groups), dtype=np.int8)
            numbers = np.array([next(made) for _ in range(rows)])
            return numbers[:, None] >> np.arange(self.groups) & 1

        moved = _drawn(weights, np.concatenate([second - first for first, second, _ in pairs.values()], axis=1), count)
        ends = np.cumsum([first.shape[1] for first, _, _ in pairs.values()])[:-1]
        p_values: dict[Key, float | None] = {}
        for (key, (first, second, score)), change in zip(pairs.items(), np.split(moved, ends, axis=1), strict=True):
            totals = first.sum(axis=0), second.sum(axis=0)
            observed = abs(score(totals[0][None]) - score(totals[1][None]))[0]
            differences = np.abs(score(totals[0] + change) - score(totals[1] - change))
            beyond = int((differences >= observed * (1 - 1e-9) - 1e-12).sum())
            p_values[key] = beyond / count if exact else (beyond + 1) / (count + 1)
        return p_values


def draw_with_replacement(generator: np.random.Generator, rows: int, count: int) -> NDArray[np.int64]:
    """How often each of `count` things is drawn in each of as many draws of them, shape (rows, count)."""
    picks = generator.integers(0, count, size=(rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(picks.ravel(), minlength=rows * count).reshape(rows, count)


def _drawn(weights: Callable[[int], NDArray[Any]], columns: Array, count: int) -> Array:
    """Sums of columns (D, C) under `count` drawn weights of D dialogues, shape (count, C)."""
    sums = np.empty((count, columns.shape[1]))
    for rows in _chunks(count, max(1, _CHUNK // len(columns))):
        sums[rows] = weights(rows.stop - rows.start).astype(np.float64) @ columns
    return sums


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def pseudo_values(sums: Array, score: Score) -> Array:
    """The jackknife's (Tukey 1958), shape (D,), from sums over dialogues (D, K): their mean is the score without its bias."""
    total = sums.sum(axis=0)
    whole, *without = score(np.concatenate([total[None], total - sums]))
    with np.errstate(invalid="ignore"):
        return len(sums) * whole - (len(sums) - 1) * np.array(without)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979) of a family of tests; of those without a p-value, None."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted
