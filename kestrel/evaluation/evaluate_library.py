"""Metrics of the `evaluate` library by name. Our script has the same name; this module keeps them apart."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from kestrel.errors import KestrelError

_ROOT = Path(__file__).resolve().parent.parent.parent


def evaluate_library() -> ModuleType:
    """The `evaluate` library, whatever folder Python was started in.

    From the repository's root, `import evaluate` is our evaluate.py. So this searches `sys.path` without that folder and
    puts the library into `sys.modules`, so that its own `import evaluate` finds itself too.

    Raises:
        KestrelError: it is not installed.
    """
    present = sys.modules.get("evaluate")
    if present is not None and hasattr(present, "EvaluationModule"):
        return present
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
    spec = PathFinder.find_spec("evaluate", elsewhere)
    if spec is None or spec.loader is None:
        raise KestrelError(
            "evaluation.extra_metrics needs the library evaluate; install it with pip install evaluate, or set "
            "evaluation.extra_metrics: []"
        )
    library = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = library
    try:
        spec.loader.exec_module(library)
    except BaseException:
        del sys.modules["evaluate"]
        raise
    return library


def load_metrics(names: Sequence[str]) -> dict[str, Any]:
    """Loads metrics, by the name that the table gives them.

    Args:
        names: Hub ids such as `meteor`, or local folders with the metric's script.

    Raises:
        KestrelError: the library is absent, or a metric cannot be loaded.
    """
    metrics: dict[str, Any] = {}
    for name in names:
        print(
            f"warning: evaluation.extra_metrics: {name} is Python code from the Hub or a folder, and runs as you",
            file=sys.stderr,
        )
        library = evaluate_library()
        try:
            metrics[Path(name).name] = library.load(name)
        except Exception as error:
            kind = "that folder" if Path(name).exists() else "no such local folder, and the Hub"
            raise KestrelError(
                f"evaluation.extra_metrics: cannot load {name!r} ({kind}: {_first_line(error)}). Metrics on the Hub "
                "need a network and the packages they import; a local folder NAME/ needs NAME.py in it"
            ) from error
    return metrics


def extra_scores(
    metrics: Mapping[str, Any], systems: Mapping[str, Sequence[tuple[str, str]]]
) -> dict[str, dict[str, Any]]:
    """Scores each system by each metric.

    Args:
        metrics: from `load_metrics`.
        systems: (response, reference) of each reply, by system.

    Returns:
        By system, by metric: the numbers it gives. A list with one number a reply becomes its mean, anything else is
        left out.

    Raises:
        KestrelError: a metric fails, or gives no number.
    """
    scores: dict[str, dict[str, Any]] = {system: {} for system in systems}
    for name, metric in metrics.items():
        for system, pairs in systems.items():
            try:
                result = metric.compute(
                    predictions=[response for response, _ in pairs], references=[reference for _, reference in pairs]
                )
            except Exception as error:
                raise KestrelError(
                    f"evaluation.extra_metrics: {name!r} fails on {system}: {_first_line(error)}"
                ) from error
            numbers = _numbers(result or {}, len(pairs))
            if not numbers:
                raise KestrelError(f"evaluation.extra_metrics: {name!r} gives no number that a table could show")
            scores[system][name] = numbers
    return scores


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _numbers(result: Mapping[str, Any], replies: int) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for key, value in result.items():
        values = list(value) if hasattr(value, "__len__") and not isinstance(value, (str, Mapping)) else [value]
        if len(values) not in (1, replies):
            continue
        try:
            mean = math.fsum(float(v) for v in values) / len(values)
        except (TypeError, ValueError):
            continue
        numbers[key] = mean if math.isfinite(mean) else None
    return numbers
