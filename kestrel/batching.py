"""Which dialogues make up each optimizer step, and how a step is cut into forward passes that fit the device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_WINDOW = 50  # batches whose rows are sorted by length together


def steps_of_run(
    lengths: np.ndarray, batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[np.ndarray]:
    """The order of the whole run: the row numbers of each optimizer step.

    Each epoch is a new permutation. Within windows of 50 batches, rows are sorted by length, so that little is padded,
    and then the batches are shuffled.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimizer step, over all ranks.
        epochs: passes over the rows; ignored where max_steps is given.
        max_steps: optimizer steps.
        seed: of the order.
    """
    rows = len(lengths)
    steps_an_epoch = math.ceil(rows / batch_size)
    total = max_steps if max_steps is not None else max(1, math.ceil(epochs * steps_an_epoch - 1e-9))
    steps: list[np.ndarray] = []
    epoch = 0
    while len(steps) < total:
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(rows)
        batches: list[np.ndarray] = []
        for start in range(0, rows, _WINDOW * batch_size):
            window = order[start : start + _WINDOW * batch_size]
            window = window[np.argsort(lengths[window], kind="stable")]
            batches += [window[first : first + batch_size] for first in range(0, len(window), batch_size)]
        steps += [batches[index] for index in random.permutation(len(batches))]
        epoch += 1
    return steps[:total]


def share_of(lengths: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Which rows of an optimizer step one rank computes, the longest first; each rank has long and short ones.

    Args:
        lengths: tokens of each row of the step.
        rank: rank 0 has the longest row of all.
        world_size: the number of ranks.

    Returns:
        Positions into `lengths`; none for some ranks where the step has fewer rows than ranks.
    """
    return np.argsort(-lengths, kind="stable")[rank::world_size]


def batches_within(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Cuts rows into batches of similar length that hold at most `tokens` tokens, padding included.

    The longest rows come first, so that a device too small for them fails at once. A row that is longer than the
    budget is a batch of its own.

    Args:
        lengths: tokens of each row.
        tokens: the budget: rows of a batch times its longest row.

    Yields:
        Positions into `lengths`.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def even_batches_within(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """As few batches as `batches_within` makes, as equal in size as possible: a small last one would leave a GPU idle."""
    batches = list(batches_within(lengths, tokens))
    too_low, enough = 0, tokens
    while len(batches) > 1 and enough - too_low > max(1, tokens // 64):
        budget = (too_low + enough) // 2
        tighter = list(batches_within(lengths, budget))
        if len(tighter) == len(batches):
            batches, enough = tighter, budget
        else:
            too_low = budget
    return batches
