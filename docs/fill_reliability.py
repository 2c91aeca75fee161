"""Writes the tables of docs/reliability.md from tests/faults/results, so that no number in them is typed by hand.

    python docs/fill_reliability.py

A block begins with `<!-- NAME: made by docs/fill_reliability.py -->` and ends with `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "faults" / "results"
PAGE = ROOT / "docs" / "reliability.md"
# What a block's table shows of each result, besides trials and survivors: heading -> key.
COLUMNS = {
    "kills": {"kills that hit": "interruptions_that_hit", "operations on files": "file_operations"},
    "signals": {"signals that hit": "interruptions_that_hit", "s to stop, at most": "seconds_to_stop_at_most"},
    "damage": {"refused with a message": "refused_with_a_message"},
}


def table(report: dict[str, Any], columns: dict[str, str]) -> str:
    """A row for each script, and the command, machine, versions and commit that made them."""
    head = ["", "trials", "survived", *columns]
    rows = [
        [
            f"{name.partition(' ')[2]}.py" if " " in name else "all",
            *(str(counts[key]) for key in ("trials", "survived")),
        ]
        + [str(counts[key]) for key in columns.values()]
        for name, counts in report["results"].items()
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
    machine, versions = report["machine"], report["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "peft", "datasets"))
    told = (
        f"`{report['command']}` on {machine['processor']}, {machine['cores']} cores; {named}; commit "
        f"{(report['git_commit'] or '')[:10]}, {report['date']}; {report['seconds'] / 60:.0f} min."
    )
    return "\n".join([*lines, "", told])


def filled(page: str) -> str:
    """The page with each block made anew from its report."""
    for name, columns in COLUMNS.items():
        content = table(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), columns)
        block = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = block.subn(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} blocks {name}")
    return page


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
