"""Which system is better than which, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from kestrel.evaluation.bootstrap import Bootstrap

NAMES = {"bleu": "BLEU", "rouge_l": "ROUGE-L", "f1": "F1"}
SIGNIFICANT = 0.05


def best_trivial(bootstrap: Bootstrap, kinds: Mapping[str, str], metric: str) -> str | None:
    """The trivial system with the highest score; None without one.

    Chosen on the scored replies themselves, which favours the trivial side of a comparison.
    """
    names = [name for name, kind in kinds.items() if kind == "trivial"]
    return max(names, key=lambda name: bootstrap.point[name][metric], default=None)


def paired_tests(bootstrap: Bootstrap, kinds: Mapping[str, str], folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Every pair of scored files, those against base first, and each file against the best trivial system by metric.

    Args:
        kinds: system, base, trivial or gold, by name.
        folders: where each file stands, so that a system meets the base of its own run first.
    """
    files = sorted((name for name in kinds if kinds[name] in ("system", "base")), key=lambda n: kinds[n] == "base")
    results = []
    for i, system in enumerate(files):
        for against in sorted(files[i + 1 :], key=lambda n: (kinds[n] != "base", folders[n] != folders[system])):
            metrics = [*NAMES] + [
                metric
                for metric in ("perplexity.bits_per_byte", "hits_at_1")
                if metric in bootstrap.point[system] and metric in bootstrap.point[against]
            ]
            results += [bootstrap.paired(system, against, metric) for metric in metrics]
        for metric in NAMES:
            rival = best_trivial(bootstrap, kinds, metric)
            if rival is not None:
                results.append(bootstrap.paired(system, rival, metric))
    return results


def verdicts(kinds: Mapping[str, str], paired: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the paired tests say of each system that is not the base, in words."""
    sentences = []
    for system in (name for name, kind in kinds.items() if kind == "system"):
        for kind, what in (("base", "base"), ("trivial", "the best trivial system")):
            tests = [
                t for t in paired if t["system"] == system and kinds[t["against"]] == kind and t["metric"] in NAMES
            ]
            if kind == "base":  # the base of the same run stands first
                tests = [t for t in tests if t["against"] == tests[0]["against"]]
            won = [t for t in tests if _is_significant(t) and t["difference"] > 0]
            lost = [t for t in tests if t not in won]
            if won:
                sentences.append(f"{system} beats {what} in {_told(won)}.")
            if lost:
                sentences.append(f"{system} does NOT beat {what} in {_told(lost)}.")
    return sentences


def _is_significant(test: Mapping[str, Any]) -> bool:
    return test["p_value"] is not None and test["p_value"] < SIGNIFICANT


def _told(tests: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for test in tests:
        against = "" if test["against"] == "base" else f" against {test['against']}"
        if test["p_value"] is None:
            sure = "no test without a second dialogue"
        elif not _is_significant(test):
            sure = f"p = {test['p_value']:.3f}: not significant"
        else:
            sure = f"p = {test['p_value']:.3f}" + (": significantly worse" if test["difference"] < 0 else "")
        difference = f"{test['difference']:+.2f}".replace("-", "−")
        parts.append(f"{NAMES[test['metric']]} ({difference}{against}, {sure})")
    return ", ".join(parts)


def spread_over_seeds(groups: Mapping[str, str], bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean and spread over the seeds of one system, for each that has several.

    Args:
        groups: what each file's system is called without its seed or run.
    """
    result: dict[str, Any] = {}
    for group in dict.fromkeys(groups.values()):
        members = [name for name in groups if groups[name] == group]
        if len(members) < 2:
            continue
        shared = [key for key in bootstrap.point[members[0]] if all(key in bootstrap.point[m] for m in members)]
        spreads = {key: spread_of([bootstrap.point[m][key] for m in members]) for key in shared}
        result[group] = {"members": members} | {key: spread for key, spread in spreads.items() if spread is not None}
    return result


def spread_of(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, sample standard deviation and range of two scores or more; None where one is not finite."""
    if not np.isfinite(values).all():
        return None
    return {"mean": mean(values), "std": stdev(values), "min": min(values), "max": max(values)}
