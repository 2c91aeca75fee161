"""Fills the table of docs/metrics.md that says how intervals and tests hold for few dialogues.

python docs/fill_significance.py
"""

from __future__ import annotations

import json
import sys

from blocks import ROOT, fill_page, table

RECORD = ROOT / "benchmarks" / "results" / "significance.json"
COLUMNS = {
    "false alarms": "false alarms",
    "false alarms, paired bootstrap": "paired bootstrap",
    "power": "power",
    "power, paired bootstrap": "paired bootstrap",
    "power at equal false alarms": "power at 5% false alarms",
    "power at equal false alarms, paired bootstrap": "paired bootstrap",
    "coverage": "coverage of a score",
    "coverage of differences": "of a difference",
    "coverage of differences by percentiles": "by percentiles",
}


def blocks() -> dict[str, str]:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = [
        [
            {"f1": "F1", "bleu": "BLEU"}[row["metric"]],
            f"{row['dialogues']:,}",
            *("none" if row[key] is None else f"{row[key]:.1%}" for key in COLUMNS),
        ]
        for row in record["results"]
    ]
    trials = record["results"][0]["trials"]
    made = f"`{record['command']}`, {trials:,} samples a row, seed {record['seed']}, {record['date']}."
    return {"significance": table(["score", "dialogues", *COLUMNS.values()], rows, numeric=True) + f"\n\n{made}"}


def main() -> int:
    fill_page("docs/metrics.md", blocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())
