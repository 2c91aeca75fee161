"""Plots of an evaluation: each as SVG whose colours follow the page's theme, and as PNG for places without CSS."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.evaluation.metric_table import DETAILED, HEADLINES, Metric
from kestrel.evaluation.scoring import Evaluation
from kestrel.evaluation.spread import SPREAD_METRICS
from kestrel.evaluation.tables import shortened
from kestrel.runtime.training_log import draw_loss, loss_curves

# The light theme's colours; the SVG refers to them as CSS variables of these names, which the dark theme redefines.
COLOURS = {
    "ink": "#22252a",
    "muted": "#6a7078",
    "rule": "#dcdad4",
    "adapter": "#1f5fa8",
    "base": "#b8560f",
    "trivial": "#858b93",
    "other1": "#2a7a4b",
    "other2": "#8a4a9e",
    "other3": "#0f7c86",
    "other4": "#a23b52",
}
_WIDTH = 5.4  # inches at 72 points: readable when a phone shows the figure in 340 pixels
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))  # with markers, so that grey tells systems apart too
_STYLE = {
    "backend": "agg",
    "svg.fonttype": "none",
    "svg.hashsalt": "kestrel",
    "text.parse_math": False,  # a system may have a $ in its name
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["rule"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figure:
    """One plot. `name` is its file name without an ending, `caption` says what it shows."""

    name: str
    caption: str
    svg: str
    png: bytes


def colour_names(evaluation: Evaluation) -> dict[str, str]:
    """A name in `COLOURS` for each system of the table."""
    others = [f"other{i}" for i in (1, 2, 3, 4)]
    names = {name: "trivial" for name in evaluation.systems} | {"gold": "ink"}
    tuned = evaluation.of_kind("system")
    names |= {name: others[(i - 1) % 4] if i else "adapter" for i, name in enumerate(tuned)}
    return names | dict.fromkeys(evaluation.of_kind("base"), "base")


def all_figures(evaluation: Evaluation, log: Path | None) -> list[Figure]:
    """The plots for which there are numbers.

    Args:
        log: the run's training.jsonl, which may be absent.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        caption = "Scores with 95% intervals (bootstrap over dialogues). The references themselves score 100."
        # No row of gold, whose 100 would press the others together.
        figures = [
            _rendered(
                "scores", caption, _scores(evaluation, HEADLINES, evaluation.of_kind("system", "base", "trivial"))
            )
        ]
        files = evaluation.of_kind("system", "base")
        if further := [
            m for m in SPREAD_METRICS if not m.headline and any(m.name in evaluation.systems[f].sums for f in files)
        ]:
            caption = "Further scores of the files, with 95% intervals (bootstrap over dialogues)."
            figures.append(_rendered("further", caption, _scores(evaluation, further, files)))
        rivals = " and the best trivial system" if evaluation.of_kind("trivial") else ""
        for name, label, what in (
            ("by_reply", "number of the reply in its dialogue", "the number of the reply"),
            ("by_length", "words in the reference", "the length of the reference"),
        ):
            if bins := evaluation.metrics[name]:
                caption = f"{DETAILED.label} with 95% intervals by {what}, for every scored file{rivals}."
                figures.append(_rendered(name, caption, _lines(label, bins, colour_names(evaluation))))
        figures.append(_rendered("lengths", "How long responses and references are, in words.", _lengths(evaluation)))
        if log and (curves := loss_curves(log)):
            canvas, axes = _canvas(2.8)
            draw_loss(axes, curves, COLOURS["adapter"], COLOURS["base"])
            _style(axes)
            figures.append(_rendered("loss", "Loss on the replies while training.", canvas))
    return figures


def _canvas(height: float, rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, several below each other as an array."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
    return canvas, canvas.subplots(rows)


def _rendered(name: str, caption: str, canvas: Any) -> Figure:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    canvas.set_layout_engine("none")  # it is laid out
    canvas.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Figure(name, caption, _themed(svg.getvalue(), name), png.getvalue())


def _themed(svg: str, name: str) -> str:
    """An SVG for the inside of a page: no prologue, ids of its own, colours and font of the page."""
    svg = svg[svg.index("<svg") :]
    # Its style sheet would hold for the page; report.css has the same for figures.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, value in COLOURS.items():
        svg = re.sub(value, f"var(--{colour})", svg, flags=re.IGNORECASE)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-labelledby="{name}-caption">', svg)


def _scores(evaluation: Evaluation, metrics: Sequence[Metric], names: Sequence[str]) -> Any:
    """A part for each score, with a row for each system."""
    colours, entries = colour_names(evaluation), evaluation.metrics["systems"]
    canvas, all_axes = _canvas(len(metrics) * (0.55 + 0.23 * len(names)), len(metrics))
    for axes, metric in zip(np.atleast_1d(all_axes), metrics, strict=True):
        for row, name in enumerate(reversed(names)):
            score, interval = metric.read(entries[name])
            if score is None:
                continue
            colour = COLOURS[colours[name]]
            axes.plot(interval or (score, score), [row, row], color=colour, linewidth=2.2, alpha=0.75)
            axes.plot(score, row, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(names)), [_label(name) for name in reversed(names)])
        axes.set_ylim(-0.6, len(names) - 0.4)
        if metric.range[0] == 0:
            axes.set_xlim(left=0)
        axes.set_title(metric.label)
        axes.tick_params(length=0)
        axes.grid(axis="x", linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_axisbelow(True)
    return canvas


def _lines(label: str, bins: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Any:
    systems = list(bins[0]["systems"])
    canvas, axes = _canvas(3.0 + _legend_below(len(systems)))
    for i, system in enumerate(systems):
        entries = [row["systems"][system] for row in bins]
        places = [x + 0.12 * (i - (len(systems) - 1) / 2) for x in range(len(bins))]
        colour = COLOURS[colours[system]]
        for x, entry in zip(places, entries, strict=True):
            if entry["ci95"]:
                axes.plot([x, x], entry["ci95"], color=colour, linewidth=1.6, alpha=0.6)
        style = {"marker": _MARKERS[i % len(_MARKERS)], "linestyle": _LINES[i % len(_LINES)], "markersize": 4.5}
        axes.plot(places, [e["score"] for e in entries], color=colour, label=_label(system), **style)
    axes.set_xticks(range(len(bins)), [row["bin"] for row in bins])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=label, ylabel=DETAILED.label)
    _style(axes)
    return canvas


def _lengths(evaluation: Evaluation) -> Any:
    shown = [*evaluation.of_kind("system", "base"), "gold"]
    tokens = evaluation.choices.units.tokens
    colours = colour_names(evaluation)
    lengths = {name: [len(tokens(text)) for text in evaluation.systems[name].responses] for name in shown}
    # The axis ends just after 99% of the references; the last bin holds all longer replies.
    last = max(10, sorted(lengths["gold"])[int(0.99 * (len(lengths["gold"]) - 1))] + 5)
    canvas, axes = _canvas(2.8 + _legend_below(len(shown)))
    for i, name in enumerate(shown):
        counts = Counter(min(length, last) for length in lengths[name])
        heights = [100 * counts[n] / len(lengths[name]) for n in range(last + 1)]
        label, width = ("references", 2.4) if name == "gold" else (_label(name), 1.5)
        style = {"linestyle": _LINES[i % len(_LINES)], "linewidth": width, "color": COLOURS[colours[name]]}
        axes.step(range(last + 1), heights, where="mid", label=label, **style)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=f"words of a reply ({last}: {last} and more)", ylabel="% of replies")
    _style(axes)
    return canvas


def _legend_below(entries: int) -> float:
    """The height of a legend below the axes, where it would cover the lines; 0 where it would not."""
    return 0.12 * entries if entries > 3 else 0.0


def _style(axes: Any) -> None:
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    style = {"labelcolor": COLOURS["ink"], "fontsize": 9.5}
    if _legend_below(len(axes.get_legend_handles_labels()[1])):
        axes.figure.legend(loc="outside lower center", ncols=2, **style)
    else:
        axes.legend(loc="best", **style)


def _label(name: str) -> str:
    return shortened(name, 22)
