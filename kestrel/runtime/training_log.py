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


def plot_loss(log: Path, picture: Path) -> None:
    """Training and validation loss by optimizer step, from training.jsonl to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_log(log)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("negative log-likelihood per reply token (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    with write_atomically(picture, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
