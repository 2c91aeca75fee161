"""Metrics of the `evaluate` library by name. Our script has the same name; this module keeps them apart."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kestrel.errors import KestrelError
from kestrel.hub import first_line

_ROOT = Path(__file__).resolve().parent.parent.parent


def evaluate_library() -> ModuleType:
    """The `evaluate` library, whatever folder Python was started in.

    From the repository's root, `import evaluate` is our evaluate.py. So this imports without that folder in `sys.path`.

    Raises:
        KestrelError: it is not installed.
    """
    present, path = sys.modules.get("evaluate"), sys.path
    if present is not None and hasattr(present, "EvaluationModule"):
        return present
    sys.modules.pop("evaluate", None)
    sys.path = [entry for entry in path if Path(entry or ".").resolve() != _ROOT]
    try:
        return importlib.import_module("evaluate")
    except ModuleNotFoundError as error:
        raise KestrelError(
            "evaluation.extra_metrics needs the library evaluate; install it with pip install evaluate, or set "
            "evaluation.extra_metrics: []"
        ) from error
    finally:
        sys.path = path


def load_metrics(names: Sequence[str], key: str = "evaluation.extra_metrics") -> dict[str, Any]:
    """Metrics by the name that the table gives them.

    Args:
        names: Hub ids such as `meteor`, or local folders with the metric's script.
        key: the setting that names them, for messages.

    Raises:
        KestrelError: the library is absent, or a metric cannot be loaded.
    """
    metrics: dict[str, Any] = {}
    for name in names:
        print(
            f"warning: {key}: {name} is Python code from the Hub or a folder, and runs as you",
            file=sys.stderr,
        )
        library = evaluate_library()
        try:
            metrics[Path(name).name] = library.load(name)
        except Exception as error:
            kind = "that folder" if Path(name).exists() else "no such local folder, and the Hub"
            raise KestrelError(
                f"{key}: cannot load {name!r} ({kind}: {first_line(error)}). Metrics on the Hub "
                "need a network and the packages they import; a local folder NAME/ needs NAME.py in it"
            ) from error
    return metrics


def extra_scores(
    metrics: Mapping[str, Any], pairs: Sequence[tuple[str, str]], **options: Any
) -> dict[str, dict[str, float | None]]:
    """The numbers that each metric of `load_metrics` gives one system.

    A list with one number per reply becomes its mean; what is no number is left out.

    Args:
        pairs: response and reference of each reply.
        options: what else the metrics' `compute` takes.

    Raises:
        KestrelError: a metric fails, or gives no number.
    """
    scores = {}
    responses, references = map(list, zip(*pairs, strict=True))
    for name, metric in metrics.items():
        try:
            result = metric.compute(predictions=responses, references=references, **options) or {}
        except Exception as error:
            raise KestrelError(f"evaluation.extra_metrics: {name!r} fails: {first_line(error)}") from error
        means = {key: _mean(value, len(pairs)) for key, value in result.items()}
        scores[name] = {key: n if math.isfinite(n) else None for key, n in means.items() if n is not None}
        if not scores[name]:
            raise KestrelError(f"evaluation.extra_metrics: {name!r} gives no number that a table could show")
    return scores


def _mean(value: Any, replies: int) -> float | None:
    """Of a number, or of a list with a number per reply; None of anything else."""
    values = list(value) if hasattr(value, "__len__") and not isinstance(value, (str, Mapping)) else [value]
    try:
        return math.fsum(map(float, values)) / len(values) if len(values) in (1, replies) else None
    except (TypeError, ValueError):
        return None
