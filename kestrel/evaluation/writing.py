"""Whether a system writes as the references do. Capitals and spaces before punctuation cost BLEU whatever is said."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kestrel.evaluation.generations import Generations

_SPACED = re.compile(r"\w (?:[.,!?;:]|n't\b|'\w)")
_CLOSED = re.compile(r"\w(?:[.,!?;:](?:\s|$)|n't\b|'\w)")


class Convention(NamedTuple):
    """A way of writing: whether a text follows it, whether it could, and the normalization that removes it."""

    name: str
    follows: Callable[[str], Any]
    applies: Callable[[str], Any]
    remedy: str


CONVENTIONS = (
    Convention("capital letters", lambda text: text != text.lower(), str.strip, "lower"),
    Convention(
        "spaces before punctuation", _SPACED.search, lambda text: _SPACED.search(text) or _CLOSED.search(text), "parlai"
    ),
)
_REMOVES = ("raw", "lower", "parlai")  # each normalization removes what those before it do


def writing_gap(responses: Sequence[str], references: Sequence[str]) -> dict[Convention, tuple[float, float]]:
    """Conventions in which responses and references differ by more than half of the texts that could follow them.

    Returns:
        Shares of the responses and of the references that follow each.
    """
    gaps = {}
    for convention in CONVENTIONS:
        shares = []
        for texts in (responses, references):
            following = [bool(convention.follows(text)) for text in texts if convention.applies(text)]
            shares.append(sum(following) / len(following) if following else math.nan)
        if abs(shares[0] - shares[1]) > 0.5:
            gaps[convention] = (shares[0], shares[1])
    return gaps


def writing_notes(files: Sequence[Generations], normalization: str) -> list[str]:
    """A warning for each file that writes in another convention, which the normalization leaves in."""
    notes = []
    for file in files:
        gaps = writing_gap([r.response for r in file.replies], [r.reference for r in file.replies])
        left = {c: s for c, s in gaps.items() if _REMOVES.index(c.remedy) > _REMOVES.index(normalization)}
        if left:
            shares = [
                f"{c.name} in {one:.0%} of its responses and {two:.0%} of the references"
                for c, (one, two) in left.items()
            ]
            notes.append(
                f"WARNING: {file.system} writes in another convention than the references ({', '.join(shares)}), which "
                f"costs it BLEU whatever it says. Score with --evaluation.normalization {[*left][-1].remedy}, or write "
                "the training data as the references are written."
            )
    return notes
