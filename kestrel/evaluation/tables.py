"""The tables of an evaluation, once for terminal, report.md and report.html."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kestrel.evaluation.metric_table import BY_NAME, DETAILED, METRICS, Column, Metric
from kestrel.evaluation.spread import SPREAD_METRICS
from kestrel.evaluation.verdicts import WORSE
from kestrel.runtime.output import print_marked

WIDTH = 100  # columns of the terminal
NONE = "–"  # a cell without a value
_LONGEST_NAME = 18
_TITLES = {
    "scores": "Scores with 95% intervals (0–100; perplexity per token)",
    "ranking": "Rank of the reference among the candidates, by likelihood",
    "persona": "What the replies say of the persona; questions and repetition",
    "properties": "Other conventions, and what the replies are like",
    "perplexity": "Perplexity of the references: three units, not comparable with each other",
}
_ORDERS_LEGEND = (
    "The same sentences of the persona, shuffled for each dialogue; all other tables are of the order as given. "
)


@dataclass(frozen=True)
class Table:
    """Text cells under headings; the first column names the row, the others are numbers.

    Attributes:
        legend: what the headings mean, where they do not say so themselves.
        detail: left to the report; evaluate.py does not print it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str = ""
    detail: bool = False


def number(value: float | None, show: str = ",.2f") -> str:
    return NONE if value is None else format(value, show)


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _with_interval(score: float | None, interval: Sequence[float] | None, show: str = ",.2f") -> str:
    """Score and interval; an interval without width, as that of gold, says nothing and is left out."""
    low, high = (number(end, show) for end in interval or (None, None))
    return number(score, show) + (f" [{low}, {high}]" if low != high else "")


Cell = Callable[[Mapping[str, Any]], str]


def _systems_table(title: str, metrics: Mapping[str, Any], columns: Sequence[tuple[str, Cell]], legend: str) -> Table:
    """A row for each system; columns and rows without any value are left out."""
    systems = metrics["systems"]
    filled = [(name, [cell(entry) for entry in systems.values()]) for name, cell in columns]
    filled = [(name, cells) for name, cells in filled if any(cell != NONE for cell in cells)]
    rows = [(name, *(cells[i] for _, cells in filled)) for i, name in enumerate(systems)]
    shown = tuple(row for row in rows if set(row[1:]) - {NONE})
    return Table(title, ("System", *(name for name, _ in filled)), shown, legend)


def _metrics_table(name: str, metrics: Mapping[str, Any]) -> Table:
    """The columns that the metric table has under `name`."""
    gold = metrics["systems"]["gold"]
    columns: list[tuple[str, Cell]] = []
    headings: dict[str, list[str]] = {}
    for metric in METRICS:
        if all(metric.read(entry)[0] is None for entry in metrics["systems"].values()):
            continue
        for column in (column for column in metric.columns if column.table == name):
            heading = column.heading if isinstance(column.heading, str) else column.heading(metric.signature_in(gold))
            columns.append((heading, partial(_cell, metric, column)))
            if metric.legend:
                headings.setdefault(metric.legend, []).append(heading)
    legend = " ".join(f"{', '.join(names)}: {meaning}." for meaning, names in headings.items())
    return _systems_table(_TITLES[name], metrics, columns, legend)


def _cell(metric: Metric, column: Column, entry: Mapping[str, Any]) -> str:
    score, interval = metric.read(entry)
    return _with_interval(score, interval if column.interval else None, column.show or metric.show)


scores_table = partial(_metrics_table, "scores")


def paired_table(metrics: Mapping[str, Any]) -> Table:
    """Every paired test."""
    rows = tuple(
        (
            f"{test['system']} − {test['against']}",
            BY_NAME[test["metric"]].label,
            signed(test["difference"]),
            f"[{signed(test['ci95'][0])}, {signed(test['ci95'][1])}]" if test["ci95"] else NONE,
            number(test["p_value"], ".4f"),
            number(test["p_holm"], ".4f"),
        )
        for test in metrics["paired"]
    )
    legend = (
        f"p: {metrics['paired_test']}. The best trivial system is chosen by metric on these very replies. "
        "p (Holm): adjusted for all tests of this table."
    )
    columns = ("Pair", "Metric", "Difference", "95% interval", "p", "p (Holm)")
    return Table("Paired differences", columns, rows, legend, detail=True)


def _spread_table(
    title: str, spreads: Mapping[str, Any], legend: str, more: Mapping[str, Callable[[str, Metric], str]] | None = None
) -> Table:
    """Scores over several files of one system; `more` are further columns, of a row's name and metric."""
    more, rows = more or {}, []
    for name, entry in spreads.items():
        for metric in (metric for metric in SPREAD_METRICS if metric.name in entry):
            spread, show = entry[metric.name], metric.show
            middle = f"{spread['mean']:{show}} ± {spread['std']:{show}}"
            low, high, change = spread["min"], spread["max"], number(spread["relative_change"], ".1%")
            further = [cell(name, metric) for cell in more.values()]
            rows.append((name, metric.label, middle, *further, number(low, show), number(high, show), change))
    columns = ("System", "Metric", "mean ± SD", *more, "lowest", "highest", "change")
    legend += "SD: standard deviation. change: (highest − lowest) / mean."
    return Table(title, columns, tuple(rows), legend)


def seeds_table(metrics: Mapping[str, Any]) -> Table:
    """The spread over seeds, which is that of training, beside the uncertainty over dialogues that each seed has."""
    groups = {f"{name} (n = {len(g['members'])})": g for name, g in metrics["groups"].items()}

    def over_dialogues(name: str, metric: Metric) -> str:
        intervals = [metric.read(metrics["systems"][member])[1] for member in groups[name]["members"]]
        widths = [interval[1] - interval[0] for interval in intervals if interval]
        return f"±{sum(widths) / len(widths) / 2:{metric.show.replace('+', '')}}" if widths else NONE

    legend = "dialogues: half of the 95% interval over dialogues, the mean of the seeds. "
    return _spread_table("Over seeds", groups, legend, {"dialogues": over_dialogues})


def orders_table(metrics: Mapping[str, Any]) -> Table:
    """The spread over orders of the persona's sentences."""
    orders = metrics["persona_orders"]
    most = max((len(entry["orders"]) for entry in orders.values()), default=0)
    return _spread_table(f"Persona order: {most} orders", orders, _ORDERS_LEGEND)


def bins_table(title: str, heading: str, bins: Sequence[Mapping[str, Any]]) -> Table:
    """One score by bins of replies."""
    systems = list(bins[0]["systems"]) if bins else []
    rows = tuple(
        (
            row["bin"],
            f"{row['replies']:,}",
            *(_with_interval(row["systems"][name]["score"], row["systems"][name]["ci95"]) for name in systems),
        )
        for row in bins
    )
    return Table(f"{DETAILED.label} by {title}", (heading, "Replies", *systems), rows, detail=True)


def extra_table(metrics: Mapping[str, Any]) -> Table:
    """Scores by metrics of the `evaluate` library."""
    extra = next(iter(metrics["systems"].values())).get("extra", {})
    columns = [(f"{name}: {key}", partial(_extra_cell, name, key)) for name in extra for key in extra[name]]
    return _systems_table("Metrics of the evaluate library", metrics, columns, "")


def _extra_cell(name: str, key: str, entry: Mapping[str, Any]) -> str:
    return number(entry["extra"][name].get(key), ",.4f")


def conventions_table(metrics: Mapping[str, Any]) -> Table:
    """Scores by other definitions."""
    known = metrics.get("conventions", {})
    columns = [(entry["label"], partial(_convention_cell, name)) for name, entry in known.items()]
    legend = " ".join(f"{entry['label']}: {entry['signature']}." for entry in known.values())
    return _systems_table(
        "By other definitions (0–100), not comparable with the scores above", metrics, columns, legend
    )


def _convention_cell(name: str, entry: Mapping[str, Any]) -> str:
    return number(entry["conventions"].get(name))


def judgements_table(metrics: Mapping[str, Any]) -> Table:
    """How far each score goes with the judgements of people."""
    judged = metrics.get("judgements", {"correlations": {}})
    rows = [(BY_NAME[name].label, f"{tau:+.3f}") for name, tau in judged["correlations"].items()]
    title = "Judgements: which scores agree with the judges, reply by reply"
    legend = "Kendall's tau-b between the difference of the two systems in a score and the judges' preference."
    return Table(title, ("Score", "tau"), tuple(rows), legend, detail=True)


def all_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Every table of the report, in its order."""
    tables = [
        scores_table(metrics),
        seeds_table(metrics),
        orders_table(metrics),
        paired_table(metrics),
        _metrics_table("ranking", metrics),
        _metrics_table("persona", metrics),
        _metrics_table("properties", metrics),
        _metrics_table("perplexity", metrics),
        conventions_table(metrics),
        extra_table(metrics),
        judgements_table(metrics),
        bins_table("the number of the reply in its dialogue", "Reply", metrics["by_reply"]),
        bins_table("the length of the reference in words", "Words", metrics["by_length"]),
    ]
    return [table for table in tables if table.rows]


def shortened(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def as_text(table: Table, kinds: Mapping[str, str]) -> str:
    """For the terminal: at most `WIDTH` columns, by leaving out the last columns that do not fit.

    Args:
        kinds: of the systems; a blank line stands around those that need no model.
    """
    cells = [[shortened(row[0], _LONGEST_NAME), *row[1:]] for row in (table.columns, *table.rows)]
    widths = [max(len(row[j]) for row in cells) for j in range(len(table.columns))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths.pop()

    def line(row: Sequence[str]) -> str:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=False)]
        return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()

    lines = [table.title, line(cells[0]), "─" * (sum(widths) + 2 * (len(widths) - 1))]
    before = ""
    for cell, row in zip(table.rows, cells[1:], strict=True):
        kind = kinds.get(cell[0], "")
        if before and {kind, before} & {"trivial", "gold"} and kind != before:
            lines.append("")
        lines.append(line(row))
        before = kind
    return "\n".join(lines)


def summary(metrics: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What evaluate.py prints: the tables, the verdicts in words, and the notes; whether each says that something got
    worse."""
    kinds = {name: entry["kind"] for name, entry in metrics["systems"].items()}
    tables = (as_text(table, kinds) for table in all_tables(metrics) if not table.detail)
    found = [("\n\n".join([metrics["signature"], *tables]), False)]
    for heading, lines in (("", metrics["verdicts"]), ("\nNotes", metrics["notes"])):
        found += [(heading, False)] if lines else []
        for line in lines:
            wrapped = textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            found.append((wrapped, WORSE in line))
    return found


def print_summary(metrics: Mapping[str, Any]) -> None:
    """Prints `summary`; what got worse is red on a terminal."""
    for text, is_worse in summary(metrics):
        print_marked(text, is_worse)
