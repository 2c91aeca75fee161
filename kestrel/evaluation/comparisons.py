"""Which system is better than which, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kestrel.evaluation.bootstrap import Bootstrap
from kestrel.evaluation.generations import System
from kestrel.evaluation.metric_table import BY_NAME, HEADLINES, METRICS, Metric

SIGNIFICANT = 0.05


def best_trivial(bootstrap: Bootstrap, systems: Mapping[str, System], metric: Metric) -> str | None:
    """The trivial system with the best score; None without one.

    Chosen on the scored replies themselves, which favours the trivial side of a comparison.
    """
    names = [name for name, system in systems.items() if system.kind == "trivial"]
    return max(names, key=lambda name: metric.advantage(bootstrap.point[name][metric.name], 0), default=None)


def paired_tests(bootstrap: Bootstrap, systems: Mapping[str, System]) -> list[dict[str, Any]]:
    """Every pair of scored files, those against base first, and each file against the best trivial system by metric."""
    files = sorted(
        (n for n in systems if systems[n].kind in ("system", "base")), key=lambda n: systems[n].kind == "base"
    )
    tests = []
    for i, system in enumerate(files):
        own = systems[system].folder
        for against in sorted(files[i + 1 :], key=lambda n: (systems[n].kind != "base", systems[n].folder != own)):
            shared = bootstrap.point[system].keys() & bootstrap.point[against].keys()
            names = [metric.name for metric in METRICS if metric.tested and metric.name in shared]
            tests += [bootstrap.paired(system, against, name) for name in names]
        rivals = [(best_trivial(bootstrap, systems, metric), metric.name) for metric in HEADLINES]
        tests += [bootstrap.paired(system, rival, name) for rival, name in rivals if rival is not None]
    return tests


def verdicts(systems: Mapping[str, System], paired: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paired tests of each system but the base, in words."""
    sentences = []
    judged = [test for test in paired if BY_NAME[test["metric"]].headline]
    for system in (name for name in systems if systems[name].kind == "system"):
        own = systems[system].group  # seeds of one system are no rivals
        others = [(name, name) for name in systems if systems[name].kind == "system" and systems[name].group != own]
        for kind, rival in (*others, ("base", "base"), ("trivial", "the best trivial system")):
            mine = [test for test in judged if test["system"] == system]
            tests = [test for test in mine if kind in (test["against"], systems[test["against"]].kind)]
            if kind == "base":  # the base of the same run comes first
                tests = [test for test in tests if test["against"] == tests[0]["against"]]
            won = [test for test in tests if _is_significant(test) and _advantage(test) > 0]
            lost = [test for test in tests if test not in won]
            if won:
                sentences.append(f"{system} beats {rival} in {_describe(won, rival)}.")
            if lost:
                sentences.append(f"{system} does NOT beat {rival} in {_describe(lost, rival)}.")
    return sentences


def _is_significant(test: Mapping[str, Any]) -> bool:
    return test["p_value"] is not None and test["p_value"] < SIGNIFICANT


def _advantage(test: Mapping[str, Any]) -> float:
    return BY_NAME[test["metric"]].advantage(test["difference"], 0)


def _describe(tests: Sequence[Mapping[str, Any]], rival: str) -> str:
    parts = []
    for test in tests:
        against = "" if test["against"] == rival else f" against {test['against']}"
        if test["p_value"] is None:
            certainty = "no test without a second dialogue"
        elif not _is_significant(test):
            certainty = f"p = {test['p_value']:.3f}: not significant"
        else:
            certainty = f"p = {test['p_value']:.3f}" + (": significantly worse" if _advantage(test) < 0 else "")
        difference = f"{test['difference']:+.2f}".replace("-", "−")
        parts.append(f"{BY_NAME[test['metric']].label} ({difference}{against}, {certainty})")
    return ", ".join(parts)
