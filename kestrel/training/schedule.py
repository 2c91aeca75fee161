"""The learning rate over the steps of a run, and over those by which a finished run was extended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Of training.*: what the steps that extend a finished run may have of their own.
EXTENDABLE = ("steps", "learning_rate", "lr_schedule", "warmup_ratio")


def learning_rate_factor(step: int, stretches: Sequence[dict[str, Any]]) -> float:
    """The learning rate of an optimizer step (0-based), as a multiple of the first stretch's peak.

    Each stretch warms up and decays by itself. The formulas are those of transformers' schedules.

    Args:
        stretches: the values of `EXTENDABLE` for each stretch of the run, with `steps` counted from the run's beginning.
    """
    begin = 0
    for stretch in stretches[:-1]:
        if step < stretch["steps"]:
            break
        begin = stretch["steps"]
    else:
        stretch = stretches[-1]
    done, steps, peak = step - begin, stretch["steps"] - begin, stretch["learning_rate"] / stretches[0]["learning_rate"]
    warm_up = round(stretch["warmup_ratio"] * steps)
    if done < warm_up:
        return float(peak * done / warm_up)
    decayed = (done - warm_up) / max(1, steps - warm_up)
    if stretch["lr_schedule"] == "cosine":
        return float(peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * decayed))))
    if stretch["lr_schedule"] == "linear":
        return float(peak * max(0.0, (steps - done) / max(1, steps - warm_up)))
    return float(peak)
