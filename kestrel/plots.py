"""Pictures of a run."""

from __future__ import annotations

import json
from pathlib import Path

from kestrel.artifacts import write_atomically


def plot_loss(log: Path, picture: Path) -> None:
    """Training and validation loss by optimizer step, from training.jsonl to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("negative log-likelihood a reply token (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    with write_atomically(picture, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
