"""Where a system is good: one score by the number of the reply in its dialogue and by the length of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kestrel.evaluation.bootstrap import Bootstrap
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metric_table import DETAILED
from kestrel.evaluation.metrics import Array, tokens_13a

_LENGTH_BINS = ((1, 5), (6, 8), (9, 11), (12, 14), (15, 19), (20, None))
_LAST_REPLY = 8  # replies of this number and later share a bin


def breakdowns(
    contexts: Sequence[Reply], shown: Mapping[str, Array], bootstrap: Bootstrap
) -> dict[str, list[dict[str, Any]]]:
    """Scores by the number of the reply in its dialogue, and by the number of words in the reference.

    Args:
        contexts: N replies.
        shown: statistics of the metric `DETAILED`, shape (N, 2), by system.

    Returns:
        by_reply and by_length: for each bin its name, its number of replies, and each system's score with its interval.
    """
    numbers = np.array([min(reply.turn // 2 + 1, _LAST_REPLY) for reply in contexts])
    lengths = np.array([len(tokens_13a(reply.reference)) for reply in contexts])
    replies = {f"{n}" if n < _LAST_REPLY else f"{n}+": numbers == n for n in sorted(set(numbers.tolist()))}
    words = {
        f"{low}–{high}" if high else f"{low}+": (lengths >= low) & (lengths <= (high or lengths.max()))
        for low, high in _LENGTH_BINS
    }
    return {
        "by_reply": _binned(replies, shown, bootstrap) if len(replies) > 1 else [],
        "by_length": _binned({label: mask for label, mask in words.items() if mask.any()}, shown, bootstrap),
    }


def _binned(
    bins: Mapping[str, NDArray[np.bool_]], shown: Mapping[str, Array], bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    table = []
    for label, mask in bins.items():
        sums = bootstrap.sums({name: statistics * mask[:, None] for name, statistics in shown.items()})
        systems = {
            name: {
                "score": float(100 * statistics[mask, 0].mean()),
                # A resample may miss a small bin: then there is no interval.
                "ci95": bootstrap.interval(DETAILED.score(sums[name])),
            }
            for name, statistics in shown.items()
        }
        table.append({"bin": label, "replies": int(mask.sum()), "systems": systems})
    return table
