"""How far a system's scores depend on the order in which its persona's sentences stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.evaluation.comparisons import NAMES, spread_of
from kestrel.evaluation.generations import Generations

SCORES = NAMES | {"perplexity.token": "perplexity", "hits_at_1": "hits@1"}


def gather(files: Sequence[Generations]) -> tuple[list[Generations], dict[str, list[Generations]]]:
    """Tells files that stand for their system in the table from further orders of the persona.

    Args:
        files: lined up.

    Returns:
        One file of each system, in the order of the files: the one as given, or the first there is. And the further
        ones by its system, for each that has some.

    Raises:
        KestrelError: a file that says to be another order of the persona holds another persona.
    """
    groups: dict[tuple[Path, str], list[Generations]] = {}
    for file in files:
        groups.setdefault((file.path.resolve().parent, file.unordered), []).append(file)
    for key in [key for key, group in groups.items() if all(file.order for file in group)]:
        # Its file in the order as given may stand in another folder: of two runs' same base one is scored.
        homes = [home for home in groups if home[1] == key[1] and any(not file.order for file in groups[home])]
        if len(homes) == 1:
            groups[homes[0]] += groups.pop(key)
    first, further = [], {}
    for group in groups.values():
        chosen, *others = sorted(group, key=lambda file: file.order)
        first.append(chosen)
        if others:
            further[chosen.system] = others
        for file in others:
            _check_personas(chosen, file)
    return first, further


def _check_personas(first: Generations, other: Generations) -> None:
    for one, two in zip(first.replies, other.replies, strict=True):
        if one.persona is not None and two.persona is not None and sorted(one.persona) != sorted(two.persona):
            raise KestrelError(
                f"{other.path}:{two.line}: by its name, its persona is that of {first.path}:{one.line} in another "
                "order, but the sentences are others; rename the file, or leave it out"
            )


def spread_over_orders(
    first: Generations, further: Sequence[Generations], points: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Mean and spread of one system's scores over the orders.

    Args:
        first, further: from `gather`.
        points: the scores of each of these files.

    Returns:
        orders: their numbers, 0 as given. reordered: share of the replies in further files whose persona does stand in
        another order than in the first; a persona of one sentence has only one. By score: mean, std, min, max, the
        values, and relative_change, (max - min) / mean.
    """
    pairs = [(one, two) for file in further for one, two in zip(first.replies, file.replies, strict=True)]
    entry: dict[str, Any] = {
        "orders": [file.order for file in (first, *further)],
        "files": [str(file.path) for file in (first, *further)],
        "reordered": sum(one.persona != two.persona for one, two in pairs) / len(pairs),
    }
    for key in SCORES:
        values = [point[key] for point in points if key in point]
        spread = spread_of(values) if len(values) == len(points) else None
        if spread is not None:
            change = (spread["max"] - spread["min"]) / spread["mean"] if spread["mean"] else None
            entry[key] = spread | {"relative_change": change, "values": values}
    return entry


def order_verdicts(
    spreads: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str], folders: Mapping[str, Path]
) -> list[str]:
    """What the spread means, in words: its size, and whether a lead over the base outlasts it.

    Args:
        spreads: of `spread_over_orders` by system.
        kinds: system or base, by system.
        folders: where each system's file stands; the base of its own run comes first.
    """
    sentences = []
    for name, entry in spreads.items():
        told = [_told(label, entry[key]) for key, label in SCORES.items() if key in entry and key != "hits_at_1"]
        sentences.append(
            f"{name} over {len(entry['orders'])} orders of the persona's sentences changes by {', '.join(told)}; each is "
            "(highest − lowest) / mean."
        )
    for name in (name for name in spreads if kinds[name] == "system"):
        bases = sorted((b for b in spreads if kinds[b] == "base"), key=lambda b: folders[b] != folders[name])
        for base in bases[:1]:
            ahead = [key for key in NAMES if spreads[name][key]["min"] > spreads[base][key]["max"]]
            for verb, keys in (("is still ahead", ahead), ("is NOT ahead", [key for key in NAMES if key not in ahead])):
                if keys:
                    metrics = ", ".join(NAMES[key] for key in keys)
                    sentences.append(f"{name} in its worst order {verb} of {base} in its best order in {metrics}.")
    return sentences


def _told(label: str, spread: Mapping[str, Any]) -> str:
    change = 100 * (spread["relative_change"] or 0)
    return f"{change:.1f}% in {label} ({spread['min']:.2f} to {spread['max']:.2f})"
