"""report.html, which needs no network and runs nothing that a reply contains, and report.md with the same content."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kestrel.evaluation import markdown
from kestrel.evaluation.figures import COLOURS, Figure, all_figures, colour_names
from kestrel.evaluation.markdown import escape
from kestrel.evaluation.metric_table import DETAILED, HEADLINES
from kestrel.evaluation.sample_dialogues import SampleDialogue, sample_dialogues
from kestrel.evaluation.scoring import Evaluation
from kestrel.evaluation.tables import all_tables

_PAGE = Path(__file__).with_name("page")


def write_report(folder: Path, evaluation: Evaluation, log: Path, samples: int, seed: int) -> None:
    """Writes report.html, report.md and the plots as PNG.

    Args:
        log: the run's training.jsonl; its curve is shown where it exists.
        samples: dialogues to browse, chosen by `seed`.
    """
    figures = all_figures(evaluation, log)
    dialogues = sample_dialogues(evaluation, samples, seed)
    for figure in figures:
        (folder / f"{figure.name}.png").write_bytes(figure.png)
    (folder / "report.html").write_text(as_html(evaluation, figures, dialogues), encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(evaluation, figures, dialogues), encoding="utf-8")


def as_html(evaluation: Evaluation, figures: Sequence[Figure], dialogues: Sequence[SampleDialogue]) -> str:
    """The page. Text is escaped where it is put in; a policy in the page lets no other script than its own run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scores, *others = all_tables(evaluation.metrics)
    return environment.get_template("report.html.j2").render(
        metrics=evaluation.metrics,
        signatures=_signatures(evaluation.metrics),
        scores=scores,
        tables=others,
        figures=figures,
        dialogues=dialogues,
        detailed=DETAILED.label,
        shown=evaluation.of_kind("system", "base"),
        flags=sorted({flag for dialogue in dialogues for flag in dialogue.flags}),
        colours=COLOURS,
        colour_of=colour_names(evaluation),
        style=(_PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
    )


def _signatures(metrics: dict[str, Any]) -> dict[str, str]:
    gold = metrics["systems"]["gold"]
    return {"run": metrics["signature"]} | {metric.label: metric.signature_in(gold) for metric in HEADLINES}


def as_markdown(evaluation: Evaluation, figures: Sequence[Figure], dialogues: Sequence[SampleDialogue]) -> str:
    """The same for the Hub: signatures, verdicts, tables, plots, notes, and six dialogues."""
    metrics: dict[str, Any] = evaluation.metrics
    parts = [
        "# Evaluation",
        "{n_replies:,} replies of {n_dialogues:,} dialogues, {0} split.".format(
            metrics["split"] or "unknown", **metrics
        ),
        "```\n" + "\n".join(_signatures(metrics).values()) + "\n```",
        "\n".join(f"- {escape(sentence)}" for sentence in metrics["verdicts"]),
    ]
    for table in all_tables(metrics):
        parts += [f"### {escape(table.title)}", markdown.table(table.columns, table.rows), escape(table.legend)]
    parts += [
        "## Plots",
        *(f"![{escape(figure.caption)}]({figure.name}.png)" for figure in figures),
        "## Notes",
        "\n".join(f"- {escape(note)}" for note in metrics["notes"]),
        "\n".join(f"- **{escape(name)}**: {escape(entry['made_by'])}" for name, entry in metrics["systems"].items()),
    ]
    few = [*dialogues[:2], *dialogues[len(dialogues) // 2 :][:2], *dialogues[-2:]]
    if few:
        parts.append("## Dialogues: two of the best, two of the middle, two of the worst")
    for dialogue in {d.dialogue_id: d for d in few}.values():
        parts.append(f"### {escape(dialogue.dialogue_id)}")
        parts += [f"> {escape(sentence)}  " for sentence in dialogue.persona]
        for exchange in dialogue.exchanges:
            lines = [f"- {turn.speaker}: {escape(turn.text)}" for turn in exchange.turns]
            lines.append(f"- **reference**: {escape(exchange.reference)}")
            lines += [f"- **{escape(r.system)}** ({r.score:.0f}): {escape(r.text)}" for r in exchange.responses]
            parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"
