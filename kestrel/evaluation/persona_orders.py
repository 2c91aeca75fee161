"""How far a system's scores depend on the order of its persona's sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.evaluation.comparisons import spread_of
from kestrel.evaluation.generations import Generations
from kestrel.evaluation.metric_table import HEADLINES, METRICS

ORDER_METRICS = tuple(metric for metric in METRICS if metric.orders)


def separate_orders(files: Sequence[Generations]) -> tuple[list[Generations], dict[str, list[Generations]]]:
    """Separates the files that have a row in the table from further orders of the persona.

    Returns:
        One file of each system, in the order of the files: the one with the persona as given, or with its lowest order.
        And, by system, the files of its further orders.

    Raises:
        KestrelError: a file whose name says that it is another order of the persona has another persona.
    """
    groups: dict[tuple[Path, str], list[Generations]] = {}
    for file in files:
        groups.setdefault((file.path.resolve().parent, file.name_without_order), []).append(file)
    for key in [key for key, group in groups.items() if all(file.order for file in group)]:
        # Its file in the order as given may be in another folder: of two runs' same base one is scored.
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
                "order, but the sentences differ; rename the file, or leave it out"
            )


def spread_over_orders(
    first: Generations, further: Sequence[Generations], points: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Mean and spread of one system's scores over the orders; `points` are the scores of each file.

    Returns:
        orders: their numbers, 0 as given. reordered: share of the replies in further files whose persona has another
        order than in the first; a persona of one sentence has only one. By score: mean, std, min, max, the values, and
        relative_change, (max - min) / mean.
    """
    files = [first, *further]
    pairs = [(one, two) for file in further for one, two in zip(first.replies, file.replies, strict=True)]
    entry: dict[str, Any] = {
        "orders": [file.order for file in files],
        "files": [str(file.path) for file in files],
        "reordered": sum(one.persona != two.persona for one, two in pairs) / len(pairs),
    }
    for metric in ORDER_METRICS:
        values = [point[metric.name] for point in points if metric.name in point]
        spread = spread_of(values) if len(values) == len(points) else None
        if spread is not None:
            change = (spread["max"] - spread["min"]) / spread["mean"] if spread["mean"] else None
            entry[metric.name] = spread | {"relative_change": change, "values": values}
    return entry


def order_verdicts(
    spreads: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str], folders: Mapping[str, Path]
) -> list[str]:
    """The size of each system's spread in words, and whether a lead over the base of its run holds in every order."""
    sentences = []
    for name, entry in spreads.items():
        changes = [
            f"{entry[m.name]['relative_change'] or 0:.1%} in {m.label} "
            f"({entry[m.name]['min']:{m.show}} to {entry[m.name]['max']:{m.show}})"
            for m in ORDER_METRICS
            if m.name in entry
        ]
        sentences.append(
            f"{name} over {len(entry['orders'])} orders of the persona's sentences changes by {', '.join(changes)}; "
            "each is (highest − lowest) / mean."
        )
    bases = [name for name in spreads if kinds[name] == "base"]
    for name in (name for name in spreads if kinds[name] == "system" and bases):
        base = min(bases, key=lambda b: folders[b] != folders[name])
        ahead: dict[str, list[str]] = {"is still ahead": [], "is NOT ahead": []}
        for metric in HEADLINES:
            worst, best = ("max", "min") if metric.better == "lower" else ("min", "max")
            lead = metric.advantage(spreads[name][metric.name][worst], spreads[base][metric.name][best])
            ahead["is still ahead" if lead > 0 else "is NOT ahead"].append(metric.label)
        sentences += [
            f"{name} in its worst order {verb} of {base} in its best order in {', '.join(labels)}."
            for verb, labels in ahead.items()
            if labels
        ]
    return sentences
