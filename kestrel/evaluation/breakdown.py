"""Where a system is good: one score by the number of the reply in its dialogue and by the length of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metric_table import DETAILED
from kestrel.evaluation.resampling import FEWEST, Array, Dialogues, pseudo_values
from kestrel.evaluation.units import Units

_LENGTH_BINS = ((1, 5), (6, 8), (9, 11), (12, 14), (15, 19), (20, None))
_LAST_REPLY = 8  # replies of this number and later share a bin


def breakdowns(
    contexts: Sequence[Reply], shown: Mapping[str, Array], dialogues: Dialogues, units: Units
) -> dict[str, list[dict[str, Any]]]:
    """Scores by the number of the reply in its dialogue, and by the number of words in the reference.

    Args:
        contexts: N replies.
        shown: the metric `DETAILED` of each reply, 0 to 1, by system.

    Returns:
        by_reply and by_length: for each bin its name, its number of replies, and each system's score with its interval.
    """
    numbers = np.array([min(reply.turn // 2 + 1, _LAST_REPLY) for reply in contexts])
    lengths = np.array([len(units.tokens(reply.reference)) for reply in contexts])
    replies = {f"{n}" if n < _LAST_REPLY else f"{n}+": numbers == n for n in sorted(set(numbers.tolist()))}
    words = {
        f"{low}–{high}" if high else f"{low}+": (lengths >= low) & (lengths <= (high or lengths.max()))
        for low, high in _LENGTH_BINS
    }
    return {
        "by_reply": _binned(replies, shown, dialogues) if len(replies) > 1 else [],
        "by_length": _binned({label: mask for label, mask in words.items() if mask.any()}, shown, dialogues),
    }


def _binned(
    bins: Mapping[str, NDArray[np.bool_]], shown: Mapping[str, Array], dialogues: Dialogues
) -> list[dict[str, Any]]:
    pseudo, points = {}, {}
    for label, mask in bins.items():
        for name, scores in shown.items():
            sums = dialogues.sums(np.stack([scores * mask, mask], axis=1))
            points[label, name] = float(100 * scores[mask].mean())
            few = np.count_nonzero(sums[:, 1]) < FEWEST  # dialogues that have such a reply
            pseudo[label, name] = np.full(len(sums), np.nan) if few else pseudo_values(sums, DETAILED.score)
    intervals = dialogues.intervals(pseudo, points)
    return [
        {
            "bin": label,
            "replies": int(mask.sum()),
            "systems": {
                name: {"score": points[label, name], "ci95": DETAILED.clipped(intervals[label, name])} for name in shown
            },
        }
        for label, mask in bins.items()
    ]
