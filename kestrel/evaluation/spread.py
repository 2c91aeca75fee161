"""How far a system's scores depend on the seed of its training, and on the order of its persona's sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from kestrel.errors import KestrelError
from kestrel.evaluation.generations import Generations
from kestrel.evaluation.metric_table import HEADLINES, METRICS
from kestrel.evaluation.provenance import same_experiment
from kestrel.evaluation.systems import System

SPREAD_METRICS = tuple(metric for metric in METRICS if metric.spread)


def spread_of_scores(points: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """The spread of each score that all of several files have, a number for each file.

    Returns:
        By score: mean, sample standard deviation `std`, min, max, the values, and relative_change, (max - min) / mean.
    """
    spreads = {}
    for name in points[0]:
        values = [point[name] for point in points if name in point]
        if len(values) == len(points) and np.isfinite(values).all():
            low, high, middle = min(values), max(values), mean(values)
            change = (high - low) / middle if middle else None
            spreads[name] = {
                "mean": middle, "std": stdev(values), "min": low, "max": high, "values": values, "relative_change": change,
            }  # fmt: skip
    return spreads


def spread_over_seeds(files: Sequence[Generations], systems: Mapping[str, System]) -> tuple[dict[str, Any], list[str]]:
    """The spread over the seeds of each system that has several, and why some files of one name are no seeds."""
    spreads: dict[str, Any] = {}
    notes = []
    for group, count in Counter(file.seed_group for file in files).items():
        members = [file for file in files if file.seed_group == group]
        names = [file.system for file in members]
        if count > 1 and same_experiment(members):
            spreads[group] = {"members": names} | spread_of_scores([systems[name].point for name in names])
        elif count > 1:
            notes.append(f"{', '.join(names)} differ in more than the seed, so no spread over seeds is shown.")
    return spreads, notes


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
    ordered = [sorted(group, key=lambda file: file.order) for group in groups.values()]
    for first, *others in ordered:
        for other in others:
            for one, two in zip(first.replies, other.replies, strict=True):
                if one.persona is not None and two.persona is not None and sorted(one.persona) != sorted(two.persona):
                    raise KestrelError(
                        f"{other.path}:{two.line}: by its name, its persona is that of {first.path}:{one.line} in "
                        "another order, but the sentences differ; rename the file, or leave it out"
                    )
    return [group[0] for group in ordered], {group[0].system: group[1:] for group in ordered if group[1:]}


def spread_over_orders(
    first: Generations, further: Sequence[Generations], points: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """The spread of one system's scores over the orders; `points` are the scores of each file.

    Returns:
        As `spread_of_scores`, and orders: their numbers, 0 as given. reordered: share of the replies in further files
        whose persona has another order than in the first; a persona of one sentence has only one.
    """
    files = [first, *further]
    moved = [a.persona != b.persona for file in further for a, b in zip(first.replies, file.replies, strict=True)]
    return {
        "orders": [file.order for file in files],
        "files": [str(file.path) for file in files],
        "reordered": sum(moved) / len(moved),
    } | spread_of_scores(points)


def order_verdicts(spreads: Mapping[str, Mapping[str, Any]], systems: Mapping[str, System]) -> list[str]:
    """Whether a system's lead over the base of its run holds in every order, in words."""
    sentences = []
    bases = [name for name in spreads if systems[name].kind == "base"]
    for name in (name for name in spreads if systems[name].kind == "system" and bases):
        base = min(bases, key=lambda b: systems[b].folder != systems[name].folder)
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
