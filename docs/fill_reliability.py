"""Fills the tables of docs/reliability.md from tests/faults/results, so that no number in them is typed by hand.

python docs/fill_reliability.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

from blocks import ROOT, fill_page, table

RESULTS = ROOT / "tests" / "faults" / "results"
# The columns of a block besides trials and survived: heading -> key of the result.
COLUMNS = {
    "kills": {"kills that hit": "interruptions_that_hit", "operations on files": "file_operations"},
    "signals": {"signals that hit": "interruptions_that_hit", "s to stop, at most": "seconds_to_stop_at_most"},
    "damage": {"refused with a message": "refused_with_a_message"},
}


def results(report: dict[str, Any], columns: dict[str, str]) -> str:
    """A row for each script, and the command, machine, versions and commit."""
    rows = []
    for name, counts in report["results"].items():
        script = f"{name.partition(' ')[2]}.py" if " " in name else "all"
        rows.append([script, *(str(counts[key]) for key in ("trials", "survived", *columns.values()))])
    machine, versions = report["machine"], report["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "peft", "datasets"))
    origin = (
        f"`{report['command']}` on {machine['processor']}, {machine['cores']} cores; {named}; commit "
        f"{(report['git_commit'] or '')[:10]}, {report['date']}; {report['seconds'] / 60:.0f} min."
    )
    return table(["", "trials", "survived", *columns], rows, numeric=True) + f"\n\n{origin}"


def blocks() -> dict[str, str]:
    """The content of each block."""
    return {
        name: results(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), columns)
        for name, columns in COLUMNS.items()
    }


def main() -> int:
    fill_page("docs/reliability.md", blocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())
