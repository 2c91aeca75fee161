"""The training log and its picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kestrel.runtime.atomic import write_atomically


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
    """(optimizer step, loss) by curve: training and validation, those that the log has."""
    rows = read_log(log)
    keys = {"training": "loss", "validation": "eval_loss"}
    curves = {name: [(row["step"], row[key]) for row in rows if key in row] for name, key in keys.items()}
    return {name: points for name, points in curves.items() if points}


def draw_loss(axes: Any, curves: dict[str, list[tuple[int, float]]], training: str, validation: str) -> None:
    """Draws `loss_curves` on matplotlib axes, in the colours `training` and `validation`."""
    for name, points in curves.items():
        style, colour = ("-", training) if name == "training" else ("o-", validation)
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4.5, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per reply token")


def plot_loss(log: Path, picture: Path) -> None:
    """Training and validation loss by optimizer step, from training.jsonl to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw_loss(axes, loss_curves(log), "C0", "C1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    with write_atomically(picture, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
