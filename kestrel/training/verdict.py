"""What the validation losses of a finished training say: worse, nothing learned, or learned, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kestrel.config.settings import Training

WORSE = "WORSE than"  # marks a sentence that is printed in red
_LEAST = 0.01  # nats per token: a change of perplexity by less than 1% is none


def verdict(losses: Sequence[tuple[int, float]], training: Training, picture: str) -> str:
    """A sentence or two.

    Args:
        losses: (step, validation loss in nats per token) in order; the first is of step 0, before training.
        picture: where the losses are drawn.
    """
    begun_from = "the base" if training.init_adapter is None else "the adapter that it began from"
    (_, first), *later = losses
    step, best = min(later, key=lambda each: each[1])
    last = later[-1][1]
    perplexities = (
        f"validation perplexity {_perplexity(first)} before the first step and {_perplexity(best)} at step {step:,}"
    )
    rate, epochs = f"training.learning_rate, now {training.learning_rate:g}", "train longer (training.epochs)"
    if best > first + _LEAST:
        return (
            f"training made it {WORSE} {begun_from}: {perplexities}. Lower {rate}; {picture} shows where the loss rose."
        )
    if best > first - _LEAST:
        return f"it did not learn: {perplexities}. Raise {rate}, {epochs}, or look at what is learned: preprocess.py --show 2."
    learned = f"it learned: {perplexities}."
    if last > first + _LEAST:
        return f"{learned} Then it got {WORSE} {begun_from}, {_perplexity(last)} at the end: lower {rate}."
    if last > best + _LEAST:
        return f"{learned} Later steps only fitted the training dialogues: fewer training.epochs take less time."
    before = losses[-2][1]
    return f"{learned} It was still falling: {epochs}." if last < before - _LEAST else learned


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.1f}"
