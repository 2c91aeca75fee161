"""What a finished training is called, for each course that the validation loss can take."""

from __future__ import annotations

import pytest

from kestrel.config.settings import Training
from kestrel.training.verdict import WORSE, verdict

_FIRST = "validation perplexity 44.7 before the first step and "


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (
            [3.8, 5.7, 6.0],
            f"training made it WORSE than the base: {_FIRST}298.9 at step 1. Lower training.learning_rate",
        ),
        ([3.8, 5.7, 6.0], "now 0.5; loss.png shows where the loss rose."),
        (
            [3.8, 3.795, 3.796],
            f"it did not learn: {_FIRST}44.5 at step 1. Raise training.learning_rate, now 0.5, train lo",
        ),
        ([3.8, 3.805], "it did not learn"),
        (
            [3.8, 3.0, 6.0],
            f"it learned: {_FIRST}20.1 at step 1. Then it got WORSE than the base, 403.4 at the end: lower",
        ),
        ([3.8, 3.0, 3.2], f"it learned: {_FIRST}20.1 at step 1. Later steps only fitted the training dialogues"),
        ([3.8, 3.0, 2.8], f"it learned: {_FIRST}16.4 at step 2. It was still falling: train longer (training.epochs)."),
        ([3.8, 3.0, 2.995], f"it learned: {_FIRST}20.0 at step 2."),
        ([3.8, 800.0], "WORSE than the base"),
    ],
)
def test_the_course_of_the_loss(losses: list[float], says: str) -> None:
    said = verdict([*enumerate(losses)], Training(learning_rate=0.5), "loss.png")
    assert says in said and (WORSE in said) == (losses[-1] > 5), said
    begun = verdict([*enumerate(losses)], Training(learning_rate=0.5, init_adapter="a"), "loss.png")
    assert begun == said.replace("the base", "the adapter that it began from")
