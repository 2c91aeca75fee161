"""Which system is better than which, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kestrel.evaluation.metric_table import BY_NAME, HEADLINES, METRICS, Metric
from kestrel.evaluation.resampling import Dialogues, holm, pseudo_values
from kestrel.evaluation.systems import System


def best_trivial(systems: Mapping[str, System], metric: Metric) -> str | None:
    """The trivial system with the best score; None without one.

    Chosen on the scored replies themselves, which favours the trivial side of a comparison.
    """
    names = [name for name, system in systems.items() if system.kind == "trivial"]
    return max(names, key=lambda name: metric.advantage(systems[name].point[metric.name], 0), default=None)


def _pairs(systems: Mapping[str, System]) -> list[tuple[str, str, Metric]]:
    """Every pair of scored files, those against base first, and each file against the best trivial system by metric."""
    files = sorted((n for n in systems if systems[n].is_file), key=lambda n: systems[n].kind == "base")
    pairs = []
    for i, name in enumerate(files):
        own = systems[name].folder  # the base of the same run comes first
        for against in sorted(files[i + 1 :], key=lambda n: (systems[n].kind != "base", systems[n].folder != own)):
            shared = systems[name].point.keys() & systems[against].point.keys()
            pairs += [(name, against, metric) for metric in METRICS if metric.tested and metric.name in shared]
        rivals = [(best_trivial(systems, metric), metric) for metric in HEADLINES]
        pairs += [(name, rival, metric) for rival, metric in rivals if rival is not None]
    return pairs


def paired_tests(systems: Mapping[str, System], dialogues: Dialogues) -> list[dict[str, Any]]:
    """The differences of all pairs, each with its 95% interval and p-value.

    Returns:
        For each pair and metric: system, against, metric, difference, ci95, p_value, and p_holm, which is adjusted by
        Holm's method for the number of tests in the list.
    """
    pairs = _pairs(systems)
    sums = {i: (systems[a].sums[m.name], systems[b].sums[m.name], m.score) for i, (a, b, m) in enumerate(pairs)}
    differences = {i: systems[a].point[m.name] - systems[b].point[m.name] for i, (a, b, m) in enumerate(pairs)}
    pseudo = {i: pseudo_values(one, score) - pseudo_values(two, score) for i, (one, two, score) in sums.items()}
    intervals, p_values = dialogues.intervals(pseudo, differences, symmetric=True), dialogues.p_values(sums)
    adjusted = holm([p_values[i] for i in sums])
    return [
        {
            "system": name, "against": against, "metric": metric.name, "difference": differences[i],
            "ci95": intervals[i], "p_value": p_values[i], "p_holm": adjusted[i],
        }
        for i, (name, against, metric) in enumerate(pairs)
    ]  # fmt: skip


def is_significant(test: Mapping[str, Any]) -> bool:
    return test["p_holm"] is not None and test["p_holm"] < 0.05


def advantage(test: Mapping[str, Any]) -> float:
    """By how much its system is better; negative where it is worse."""
    return BY_NAME[test["metric"]].advantage(test["difference"], 0)
