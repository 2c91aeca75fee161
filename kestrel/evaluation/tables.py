"""The tables of an evaluation, once for terminal, report.md and report.html."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kestrel.evaluation.comparisons import NAMES
from kestrel.evaluation.persona_orders import SCORES

WIDTH = 100  # columns of the terminal
_LONGEST_NAME = 18
METRIC_NAMES = NAMES | {
    "bleu_lc": "BLEU lower-cased",
    "rouge_l_other": "ROUGE-L, other stemmer choice",
    "perplexity.token": "perplexity per token",
    "perplexity.word": "perplexity per word",
    "perplexity.bits_per_byte": "bits per byte",
    "hits_at_1": "hits@1",
}


@dataclass(frozen=True)
class Table:
    """Text cells under headings; the first column names the row, the others are numbers.

    Attributes:
        title: what it shows.
        kinds: of each row: system, base, trivial, gold, or empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _with_interval(entry: Mapping[str, Any]) -> str:
    """Score and interval; an interval without width, as that of gold, says nothing and is left out."""
    low, high = (number(end) for end in entry["ci95"] or (None, None))
    return number(entry["score"]) + (f" [{low}, {high}]" if low != high else "")


Cell = Callable[[Mapping[str, Any]], str]


def _of_systems(title: str, metrics: Mapping[str, Any], columns: Sequence[tuple[str, Cell]]) -> Table:
    """A row for each system; columns in which no system has a value are left out."""
    systems = metrics["systems"]
    filled = [(name, [cell(entry) for entry in systems.values()]) for name, cell in columns]
    filled = [(name, cells) for name, cells in filled if any(cell != "–" for cell in cells)]
    rows = tuple((name, *(cells[i] for _, cells in filled)) for i, name in enumerate(systems))
    kinds = tuple(entry["kind"] for entry in systems.values())
    return Table(title, ("System", *(name for name, _ in filled)), rows, kinds)


def scores_table(metrics: Mapping[str, Any]) -> Table:
    """The scores that papers report, with their intervals."""

    def perplexity(entry: Mapping[str, Any]) -> str:
        return number(entry.get("perplexity", {}).get("token"), 1)

    return _of_systems(
        "Scores with 95% intervals (0–100; perplexity per token)",
        metrics,
        [
            *((label, lambda entry, key=key: _with_interval(entry[key])) for key, label in NAMES.items()),
            ("PPL", perplexity),
            ("hits@1", lambda entry: percent(entry.get("hits_at_1"))),
        ],
    )


def properties_table(metrics: Mapping[str, Any]) -> Table:
    """What the replies are like, and the scores under other conventions."""
    stemmed = "stemmer:yes" in metrics["systems"]["gold"]["rouge_l_other"]["signature"]

    def share(key: str) -> Cell:
        return lambda entry: percent(entry.get(key))

    return _of_systems(
        "Other conventions, and what the replies are like",
        metrics,
        [
            ("BLEU-lc", lambda entry: number(entry["bleu_lc"]["score"])),
            ("R-L stem" if stemmed else "R-L plain", lambda entry: number(entry["rouge_l_other"]["score"])),
            ("dist-1", lambda entry: number(entry["distinct_1"], 3)),
            ("dist-2", lambda entry: number(entry["distinct_2"], 3)),
            ("length", lambda entry: number(entry.get("length_ratio"))),
            ("EOS", share("stopped_by_eos")),
            ("empty", share("empty")),
            ("tags", share("speaker_tag")),
            ("cp.pers", share("copied_persona")),
            ("cp.hist", share("copied_history")),
        ],
    )


PROPERTIES_LEGEND = (
    "BLEU-lc: lower-cased BLEU. R-L: ROUGE-L with the other stemmer choice. dist-1, dist-2: different n-grams over all "
    "n-grams. length: words of the responses over words of the references. EOS: stopped by the end-of-text token. "
    "tags: responses that contain a speaker tag. cp.pers, cp.hist: responses that are a persona sentence or an "
    "earlier turn, punctuation and articles aside."
)


ORDERS_TITLE = "Persona order"
ORDERS_LEGEND = (
    "The same sentences of the persona, shuffled for each dialogue. SD: standard deviation. change: (highest − lowest) / "
    "mean. All other tables are of the order as given."
)


def perplexity_table(metrics: Mapping[str, Any]) -> Table | None:
    """The references' likelihood in its three units; None where no file has it."""

    def cell(unit: str) -> Cell:
        def show(entry: Mapping[str, Any]) -> str:
            values = entry.get("perplexity")
            return "–" if values is None else _with_interval({"score": values[unit], "ci95": values["ci95"][unit]})

        return show

    units = (("per token", "token"), ("per word", "word"), ("bits per byte", "bits_per_byte"))
    table = _of_systems(
        "Perplexity of the references: three units, not comparable with each other",
        metrics,
        [(label, cell(unit)) for label, unit in units],
    )
    keep = [i for i, row in enumerate(table.rows) if any(value != "–" for value in row[1:])]
    if not keep:
        return None
    return Table(table.title, table.columns, tuple(table.rows[i] for i in keep), tuple(table.kinds[i] for i in keep))


def paired_table(metrics: Mapping[str, Any]) -> Table:
    """Every paired test."""
    rows = tuple(
        (
            f"{test['system']} − {test['against']}",
            METRIC_NAMES[test["metric"]],
            signed(test["difference"], 3),
            f"[{signed(test['ci95'][0], 3)}, {signed(test['ci95'][1], 3)}]" if test["ci95"] else "–",
            number(test["p_value"], 4),
        )
        for test in metrics["paired"]
    )
    return Table("Paired differences", ("Pair", "Metric", "Difference", "95% interval", "p"), rows, ("",) * len(rows))


def seeds_table(metrics: Mapping[str, Any]) -> Table | None:
    """Mean and standard deviation over seeds; None where no system has several."""
    groups = metrics["groups"]
    if not groups:
        return None
    keys = [key for key in METRIC_NAMES if any(key in group for group in groups.values())]
    rows = tuple(
        (
            f"{name} (n = {len(group['members'])})",
            *(f"{group[key]['mean']:.2f} ± {group[key]['std']:.2f}" if key in group else "–" for key in keys),
        )
        for name, group in groups.items()
    )
    columns = ("System", *(METRIC_NAMES[key] for key in keys))
    return Table("Mean ± standard deviation over runs", columns, rows, ("system",) * len(rows))


def orders_table(metrics: Mapping[str, Any]) -> Table | None:
    """Scores over the orders of the persona's sentences; None where no system has several."""
    rows, kinds = [], []
    for name, entry in metrics["persona_orders"].items():
        for key in (key for key in SCORES if key in entry):
            scale = 100 if key == "hits_at_1" else 1
            values = {part: number(scale * entry[key][part]) for part in ("mean", "std", "min", "max")}
            first = number(scale * entry[key]["values"][0]) if entry["orders"][0] == 0 else "–"
            spread = (f"{values['mean']} ± {values['std']}", values["min"], values["max"])
            rows.append((name, SCORES[key], first, *spread, percent(entry[key]["relative_change"])))
            kinds.append(metrics["systems"][name]["kind"])
    if not rows:
        return None
    most = max(len(entry["orders"]) for entry in metrics["persona_orders"].values())
    columns = ("System", "Metric", "as given", "mean ± SD", "lowest", "highest", "change")
    return Table(f"{ORDERS_TITLE}: {most} orders", columns, tuple(rows), tuple(kinds))


def bins_table(title: str, heading: str, bins: Sequence[Mapping[str, Any]]) -> Table | None:
    """ROUGE-L by bins of replies; None without bins."""
    if not bins:
        return None
    systems = list(bins[0]["systems"])
    rows = tuple(
        (row["bin"], f"{row['replies']:,}", *(_with_interval(row["systems"][name]) for name in systems)) for row in bins
    )
    return Table(title, (heading, "Replies", *systems), rows, ("",) * len(rows))


def extra_table(metrics: Mapping[str, Any]) -> Table | None:
    """Scores by metrics of the `evaluate` library; None where none was asked for."""
    names = [
        (metric, key)
        for metric, values in next(iter(metrics["systems"].values())).get("extra", {}).items()
        for key in values
    ]
    if not names:
        return None

    def cell(metric: str, key: str) -> Cell:
        return lambda entry: number(entry["extra"][metric].get(key), 4)

    return _of_systems(
        "Metrics of the evaluate library",
        metrics,
        [(f"{metric}: {key}" if metric != key else key, cell(metric, key)) for metric, key in names],
    )


def all_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Every table of the report, in its order."""
    tables = [
        scores_table(metrics),
        seeds_table(metrics),
        orders_table(metrics),
        paired_table(metrics),
        properties_table(metrics),
        perplexity_table(metrics),
        extra_table(metrics),
        bins_table("ROUGE-L by the number of the reply in its dialogue", "Reply", metrics["by_reply"]),
        bins_table("ROUGE-L by the length of the reference in words", "Words", metrics["by_length"]),
    ]
    return [table for table in tables if table is not None and table.rows]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def as_text(table: Table) -> str:
    """For the terminal: at most `WIDTH` columns, by leaving out the last columns that do not fit."""
    cells = [[_short(row[0]), *row[1:]] for row in (table.columns, *table.rows)]
    widths = [max(len(row[j]) for row in cells) for j in range(len(table.columns))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths.pop()

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            text.ljust(width) if j == 0 else text.rjust(width)
            for j, (text, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()

    lines = [table.title, line(cells[0]), "─" * (sum(widths) + 2 * (len(widths) - 1))]
    for kind, before, row in zip(table.kinds, ("", *table.kinds), cells[1:], strict=False):
        if before and {kind, before} & {"trivial", "gold"} and kind != before:
            lines.append("")
        lines.append(line(row))
    return "\n".join(lines)


def summary(metrics: Mapping[str, Any]) -> str:
    """What evaluate.py prints: the tables, the verdicts in words, and the notes."""
    seeds, orders = seeds_table(metrics), orders_table(metrics)
    perplexity, extra = perplexity_table(metrics), extra_table(metrics)
    tables = [scores_table(metrics), seeds, orders, properties_table(metrics), perplexity, extra]
    parts = [f"{metrics['signature']}", *(as_text(table) for table in tables if table is not None)]
    for heading, lines in (("", metrics["verdicts"]), ("Notes", metrics["notes"])):
        wrapped = [textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
        if wrapped:
            parts.append("\n".join(([heading] if heading else []) + wrapped))
    return "\n\n".join(parts)
