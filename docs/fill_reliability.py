"""Fills the tables of docs/reliability.md from tests/faults/results and tests/fuzz/results.json.

python docs/fill_reliability.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

from blocks import ROOT, fill_page, table

RESULTS = ROOT / "tests" / "faults" / "results"
FUZZING = ROOT / "tests" / "fuzz" / "results.json"
# The columns of a block besides trials and survived: heading -> key of the result.
COLUMNS = {
    "kills": {"kills that hit": "interruptions_that_hit", "operations on files": "file_operations"},
    "signals": {"signals that hit": "interruptions_that_hit", "s to stop, at most": "seconds_to_stop_at_most"},
    "disk": {"failures that hit": "interruptions_that_hit"},
    "damage": {"refused with a message": "refused_with_a_message"},
}


def results(reports: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A row for each stage with its sums over the reports, and the commands, machine, versions and commits."""
    rows = []
    for name in reports[0]["results"]:
        counts = [report["results"][name] for report in reports if name in report["results"]]
        sums = [
            sum(count[key] for count in counts)
            for key in ("trials", "survived", "interruptions_that_hit")
            if key in counts[0]
        ]
        most = [str(max(count[key] for count in counts)) for key in columns.values() if key != "interruptions_that_hit"]
        rows.append([name.partition(" ")[2] or "all", *map(str, sums), *most])
    origins = []
    for report in reports:
        machine, versions = report["machine"], report["versions"]
        named = ", ".join(
            f"{name} {versions[name]}" for name in ("python", "torch", "transformers", "peft", "datasets")
        )
        origins.append(
            f"`{report['command']}` on {machine['processor']}, {machine['cores']} cores; {named}; commit "
            f"{(report['git_commit'] or '')[:10]}, {report['date']}; {report['seconds'] / 60:.0f} min."
        )
    return table(["", "trials", "survived", *columns], rows, numeric=True) + "\n\n" + "\n\n".join(origins)


def fuzzing(runs: list[dict[str, Any]]) -> str:
    """A row for each target, with the sums over its recorded runs."""
    rows = []
    for target in sorted({run["target"] for run in runs}):
        of_it = [run for run in runs if run["target"] == target]
        inputs, accepted, seconds = (sum(run[key] for run in of_it) for key in ("inputs", "accepted", "seconds"))
        seeds, peak = ", ".join(str(run["seed"]) for run in of_it), max(run["peak_megabytes"] for run in of_it)
        rows.append([target, f"{inputs:,}", f"{accepted:,}", f"{seconds:,.0f}", seeds, f"{peak:,}"])
    total, commits = sum(run["inputs"] for run in runs), ", ".join(sorted({run["commit"] for run in runs}))
    origin = (
        f"{total:,} inputs in all; Python {runs[-1]['python']}, {max(run['date'] for run in runs)}, commits {commits}."
    )
    return table(["target", "inputs", "accepted", "seconds", "seeds", "peak MB"], rows, numeric=True) + f"\n\n{origin}"


def blocks() -> dict[str, str]:
    """The content of each block."""
    tables = {
        name: results([json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{name}*.json"))], columns)
        for name, columns in COLUMNS.items()
    }
    return tables | {"fuzzing": fuzzing(json.loads(FUZZING.read_text(encoding="utf-8"))["runs"])}


def main() -> int:
    fill_page("docs/reliability.md", blocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())
