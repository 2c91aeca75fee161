"""report.html, which needs no network and runs nothing that stands in a reply, and report.md with the same content."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kestrel.evaluation.figures import COLOURS, Figure, all_figures, colour_names
from kestrel.evaluation.sample_dialogues import SampleDialogue, sample_dialogues
from kestrel.evaluation.scoring import Evaluation
from kestrel.evaluation.tables import ORDERS_LEGEND, ORDERS_TITLE, PROPERTIES_LEGEND, Table, all_tables

_PAGE = Path(__file__).with_name("page")
_IN_MARKDOWN = 6  # dialogues: a model card is no place to browse


def write_report(folder: Path, evaluation: Evaluation, log: Path, samples: int, seed: int) -> None:
    """Writes report.html, report.md and the plots as PNG.

    Args:
        folder: of the evaluation; exists.
        log: the run's training.jsonl; its curve is shown where it exists.
        samples: dialogues to browse.
        seed: of their choice.
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
        scores=scores,
        tables=others,
        legends={"Other conventions": PROPERTIES_LEGEND, ORDERS_TITLE: ORDERS_LEGEND},
        figures=figures,
        dialogues=dialogues,
        shown=evaluation.of_kind("system", "base"),
        flags=sorted({flag for dialogue in dialogues for flag in dialogue.flags}),
        colours=COLOURS,
        colour_of=colour_names(evaluation),
        style=(_PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
    )


def escape_markdown(text: str) -> str:
    """Text that stays text in Markdown: in a paragraph, an item, a quotation or a table's cell."""
    text = " ".join(html.escape(text, quote=False).split())
    text = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return re.sub(r"^(\d*)([-+#.)=])", r"\1\\\2", text)  # what at a line's beginning makes a list or a heading


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
    rows = [
        "| " + " | ".join(cell if i == 1 else escape_markdown(cell) for cell in row) + " |"
        for i, row in enumerate(lines)
    ]
    return f"### {escape_markdown(table.title)}\n\n" + "\n".join(rows)


def as_markdown(evaluation: Evaluation, figures: Sequence[Figure], dialogues: Sequence[SampleDialogue]) -> str:
    """The same for the Hub: signature, verdicts, tables, plots, notes, and a few dialogues."""
    metrics: dict[str, Any] = evaluation.metrics
    gold = metrics["systems"]["gold"]
    parts = [
        "# Evaluation",
        f"{metrics['n_replies']:,} replies of {metrics['n_dialogues']:,} dialogues, {metrics['split'] or 'unknown'} split.",
        "```\n"
        + "\n".join([metrics["signature"], *(gold[m]["signature"] for m in ("bleu", "rouge_l", "f1"))])
        + "\n```",
        "\n".join(f"- {escape_markdown(sentence)}" for sentence in metrics["verdicts"]),
        *(_markdown_table(table) for table in all_tables(metrics)),
        escape_markdown(PROPERTIES_LEGEND),
        f"{ORDERS_TITLE}: {escape_markdown(ORDERS_LEGEND)}" if metrics["persona_orders"] else "",
        f"Paired tests: {escape_markdown(metrics['paired_test'])}.",
        "## Plots",
        *(f"![{escape_markdown(figure.caption)}]({figure.name}.png)" for figure in figures),
        "## Notes",
        "\n".join(f"- {escape_markdown(note)}" for note in metrics["notes"]),
        "\n".join(
            f"- **{escape_markdown(name)}**: {escape_markdown(entry['made_by'])}"
            for name, entry in metrics["systems"].items()
        ),
    ]
    few = [*dialogues[:2], *dialogues[len(dialogues) // 2 :][:2], *dialogues[-2:]][:_IN_MARKDOWN]
    if few:
        parts.append("## Dialogues: of the best, of the middle, of the worst")
    for dialogue in {d.dialogue_id: d for d in few}.values():
        parts.append(f"### {escape_markdown(dialogue.dialogue_id)}")
        parts += [f"> {escape_markdown(sentence)}  " for sentence in dialogue.persona]
        for exchange in dialogue.exchanges:
            lines = [f"- {turn.speaker}: {escape_markdown(turn.text)}" for turn in exchange.turns]
            lines.append(f"- **reference**: {escape_markdown(exchange.reference)}")
            lines += [
                f"- **{escape_markdown(r.system)}** ({r.rouge_l:.0f}): {escape_markdown(r.text)}"
                for r in exchange.responses
            ]
            parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"
