"""The training log and its picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kestrel.runtime.atomic import write_atomically

_SMOOTHING = 0.6


def read_log(log: Path) -> list[dict[str, Any]]:
    """The finite numbers of each line of training.jsonl that has an integer `step`; [] if the file does not exist.

    Other lines are skipped: the log of a run that is writing, or was killed, may end in half a line.
    """
    rows = []
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({key: v for key, v in row.items() if isinstance(v, int | float) and abs(v) < math.inf})
    return rows


def loss_curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    """(optimizer step, value) by curve: training and validation loss and learning rate, those that the log has."""
    rows = read_log(log)
    keys = {"training": "loss", "validation": "eval_loss", "learning rate": "learning_rate"}
    curves = {name: [(row["step"], row[key]) for row in rows if key in row] for name, key in keys.items()}
    return {name: points for name, points in curves.items() if points}


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average, without a bias towards its first value."""
    smoothed, weight, average = [], 0.0, 0.0
    for value in values:
        weight, average = _SMOOTHING * weight + 1, _SMOOTHING * average + value
        smoothed.append(average / weight)
    return smoothed


def draw_loss(axes: Any, curves: dict[str, list[tuple[int, float]]], training: str, validation: str) -> None:
    """Draws the losses of `loss_curves` on matplotlib axes, in the colours `training` and `validation`.

    The training loss is drawn as it was logged, thin, and smoothed; the validation loss of step 0 as a line across.
    """
    if points := curves.get("training"):
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=training, linewidth=0.8, alpha=0.4)
        axes.plot(steps, _smoothed(losses), color=training, label="training, smoothed")
    if points := curves.get("validation"):
        axes.plot(*zip(*points, strict=True), "o-", color=validation, markersize=4.5, label="validation")
        if points[0][0] == 0:
            axes.axhline(points[0][1], color=validation, linestyle=":", linewidth=1, label="validation at step 0")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per reply token")


def plot_loss(log: Path, picture: Path) -> None:
    """Losses and, below them, the learning rate by optimizer step, from training.jsonl to a PNG."""
    from matplotlib.figure import Figure

    figure, curves = Figure(figsize=(7, 5), layout="constrained"), loss_curves(log)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    draw_loss(axes, curves, "C0", "C1")
    axes.set_xlabel("")
    axes.legend(frameon=False)
    below.plot(*zip(*curves.get("learning rate", [(0, 0.0)]), strict=True), color="C7", linewidth=1)
    below.set_xlabel("optimizer step")
    below.set_ylabel("learning rate")
    below.ticklabel_format(axis="y", scilimits=(0, 0))
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", alpha=0.3)
    with write_atomically(picture, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
