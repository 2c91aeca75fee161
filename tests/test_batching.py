"""Every dialogue once an epoch, in batches that fit."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from kestrel.batching import batches_within, even_batches_within, share_of, steps_of_run

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80).map(lambda values: np.asarray(values, dtype=np.int64))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_each_epoch_has_every_row_once(lengths, batch_size, epochs, seed):
    steps = steps_of_run(lengths, batch_size, epochs, None, seed)
    an_epoch = -(-len(lengths) // batch_size)
    assert len(steps) == epochs * an_epoch
    for epoch in range(epochs):
        rows = np.concatenate(steps[epoch * an_epoch : (epoch + 1) * an_epoch])
        assert sorted(rows) == list(range(len(lengths)))
    assert all(len(step) <= batch_size for step in steps)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_a_shorter_run_is_the_beginning_of_a_longer_one(lengths, batch_size, max_steps, seed):
    short = steps_of_run(lengths, batch_size, 1, max_steps, seed)
    long = steps_of_run(lengths, batch_size, 1, max_steps + 7, seed)
    assert len(short) == max_steps
    assert all(np.array_equal(a, b) for a, b in zip(short, long, strict=False))


def test_order_changes_with_the_seed_and_the_epoch():
    lengths = np.arange(1, 101)
    first, again, other = (steps_of_run(lengths, 4, 2, None, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first[:25], first[25:], strict=True))


def test_half_an_epoch():
    assert len(steps_of_run(np.ones(100, dtype=np.int64), 10, 0.5, None, 0)) == 5
    assert len(steps_of_run(np.ones(3, dtype=np.int64), 10, 0.1, None, 0)) == 1


def test_rows_of_a_step_are_of_similar_length():
    """Padding of ConvAI2-like lengths stays small; a plain shuffle would waste a third."""
    lengths = np.random.default_rng(0).normal(280, 70, 4000).clip(40, 600).astype(np.int64)

    def padded(steps: list[np.ndarray]) -> float:
        return sum(lengths[step].max() * len(step) for step in steps) / lengths.sum()

    assert padded(steps_of_run(lengths, 32, 1, None, 0)) < 1.05
    assert padded(np.array_split(np.random.default_rng(0).permutation(4000), 125)) > 1.3


@given(LENGTHS, st.integers(1, 2000))
def test_batches_hold_every_row_once_within_the_budget(lengths, tokens):
    batches = list(batches_within(lengths, tokens))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or lengths[batch].max() * len(batch) <= tokens
    tops = [lengths[batch].max() for batch in batches]
    assert tops == sorted(tops, reverse=True)


@given(LENGTHS, st.integers(1, 2000))
def test_even_batches_are_as_few_and_no_larger(lengths, tokens):
    greedy, even = list(batches_within(lengths, tokens)), even_batches_within(lengths, tokens)
    assert sorted(np.concatenate(even)) == list(range(len(lengths)))
    assert len(even) == len(greedy)
    sizes = [[int(lengths[batch].max()) * len(batch) for batch in cut] for cut in (greedy, even)]
    assert max(sizes[1]) <= max(sizes[0])
    assert all(len(batch) == 1 or size <= tokens for batch, size in zip(even, sizes[1], strict=True))


def test_no_small_batch_is_left_over():
    """33 rows where 32 fit: not 32 and 1."""
    assert sorted(len(batch) for batch in even_batches_within(np.full(33, 100), 3200)) == [16, 17]


@given(LENGTHS, st.integers(1, 9))
def test_processes_share_a_step_without_rest(lengths, processes):
    shares = [share_of(lengths, process, processes) for process in range(processes)]
    assert sorted(np.concatenate(shares)) == list(range(len(lengths)))
    assert lengths[shares[0]].max() == lengths.max()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
