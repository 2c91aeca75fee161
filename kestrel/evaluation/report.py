"""report.html, which needs no network and runs nothing that a reply contains, and report.md with the same content."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.evaluation import markdown
from kestrel.evaluation.figures import COLOURS, Figure, all_figures, colour_names
from kestrel.evaluation.metric_table import DETAILED, HEADLINES
from kestrel.evaluation.sample_dialogues import SampleDialogue, sample_dialogues, sortable_metrics
from kestrel.evaluation.scoring import Evaluation, file_name
from kestrel.evaluation.tables import all_tables

if TYPE_CHECKING:
    from jinja2 import Environment

_PAGE = Path(__file__).with_name("page")


def write_report(folder: Path, evaluation: Evaluation, log: Path | None, samples: int, seed: int) -> None:
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
    shown = evaluation.of_kind("system", "base")
    return _render(
        "report.html.j2",
        evaluation,
        figures,
        check=_check(evaluation, shown[0]),
        dialogues=dialogues,
        detailed=DETAILED.label,
        sortable=sortable_metrics(evaluation),
        shown=shown,
        flags=sorted({flag for dialogue in dialogues for flag in dialogue.flags}),
        colour_of=colour_names(evaluation),
        **page_parts("report.js"),
    )


def _check(evaluation: Evaluation, system: str) -> str:
    """A command that computes a system's BLEU again; none with several references, of which one is written."""
    if evaluation.choices.references != 1:
        return ""
    tokenizer = evaluation.choices.units.tokenizer
    named = "" if tokenizer == "13a" else f" -tok {tokenizer}"
    return f"sacrebleu responses/reference.txt -i responses/{file_name(system)} -m bleu -w 4{named}"


def as_markdown(evaluation: Evaluation, figures: Sequence[Figure], dialogues: Sequence[SampleDialogue]) -> str:
    """The same for the Hub, with six dialogues: two of the best, two of the middle, two of the worst."""
    few = [*dialogues[:2], *dialogues[len(dialogues) // 2 :][:2], *dialogues[-2:]]
    return _render("report.md.j2", evaluation, figures, dialogues=list({d.dialogue_id: d for d in few}.values()))


def page_parts(script: str) -> dict[str, Any]:
    """What every page of ours needs: colours, style, its script, and a policy that lets no other script run."""
    code = (_PAGE / script).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return {
        "colours": COLOURS,
        "style": (_PAGE / "report.css").read_text(encoding="utf-8"),
        "script": code,
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
    }


def environment(template: str) -> Environment:
    """The templates of the pages; text is escaped in those that become HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "markdown": markdown.escape,
        "table": lambda table: markdown.table(table.columns, table.rows),
    }
    return made


def _render(template: str, evaluation: Evaluation, figures: Sequence[Figure], **values: Any) -> str:
    metrics = evaluation.metrics
    gold = metrics["systems"]["gold"]
    signatures = {metric.label: metric.signature_in(gold) for metric in HEADLINES}
    return (
        environment(template)
        .get_template(template)
        .render(
            metrics=metrics,
            signatures={"run": metrics["signature"]} | signatures,
            tables=all_tables(metrics),
            figures=figures,
            **values,
        )
    )
