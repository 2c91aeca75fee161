"""Fills the tables of docs/performance.md from benchmarks/results, so that no number in it is typed by hand.

    make performance

A block whose benchmark has not been run yet says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from blocks import ROOT, fill_page, table

RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]


def where(record: Record) -> str:
    """The line under a table: command, machine, versions, commit, date, and the record's note if it has one."""
    versions = record["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    commit = " and ".join(name[:10] for name in (record.get("commit") or "").split(" and "))
    note = f" {record['note']}" if "note" in record else ""
    return f"\n`{record['command']}` on {record['device']}; {named}; commit {commit}, {record['date']}.{note}"


def training(record: Record) -> str:
    """Training with Kestrel and with other toolkits."""
    timed = [row for row in record["rows"] if "epoch_seconds" in row]
    first = timed[0]["epoch_seconds"]
    rows = [
        [
            row["name"], f"{row['useful_tokens_per_second']:,.0f}", f"{row['dialogues_per_second']:.1f}",
            f"{row['epoch_seconds']:,.0f}", f"{row['epoch_seconds'] / first:.1f}", f"{row['padding_share']:.1%}",
            f"{row['peak_bytes'] / 2**30:.1f}", f"{row['utilisation']:.0%}",
        ]
        for row in timed
    ]  # fmt: skip
    head = [
        "system",
        "useful tokens/s",
        "dialogues/s",
        "s an epoch",
        "× the first",
        "padding",
        "peak GiB",
        "utilisation",
    ]
    fewest, most = min(row["steps"] for row in timed), max(row["steps"] for row in timed)
    steps = f"{most}" if fewest == most else f"{fewest} to {most}"
    # On a GPU each dialogue is there five times (benchmarks/train.py).
    data = (
        f"{count // 5} dialogues, each five times" if (count := record["dialogues"]) >= 1000 else f"{count} dialogues"
    )
    once = f"\nEach row is a single run of {steps} steps over {data}, not a median of several."
    return table(head, rows) + "\n" + once + where(record)


def repeated(records: list[Record]) -> str:
    """What the rows that were measured more than once gave, on the same kind of card."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for row in record["rows"]:
            if "epoch_seconds" in row:
                found.setdefault((row["name"], record["device"]), []).append(row["useful_tokens_per_second"])
    rows = [
        [name, device, str(len(rates)), f"{median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"]
        for (name, device), rates in found.items()
        if len(rates) > 1
    ]
    commits = ", ".join(dict.fromkeys(record["commit"][:10] for record in records))
    head = ["system", "card", "runs", "useful tokens/s: median (range)"]
    return table(head, rows) + f"\n\nOn other days, with the code of {commits}."


def waterfall(record: Record) -> str:
    """One optimization at a time."""
    rows = [
        [
            row["what"].strip(), f"{row['tokens_per_second']:,.0f}", f"{row['utilisation']:.0%}",
            f"{row['peak_bytes'] / 2**30:.1f}", f"{row['padding_share']:.1%}",
        ]
        for row in record["rows"]
        if "tokens_per_second" in row
    ]  # fmt: skip
    rate = (
        f"\nEach row is a single run. A product of two 8192 × 8192 matrices ran at {record['matrix_flops'] / 1e12:,.0f} TFLOP/s before these rows, "
        "which utilisation is counted against."
    )
    return (
        table(["measure", "useful tokens/s", "utilisation", "peak GiB", "padding"], rows) + "\n" + where(record) + rate
    )


def layers(record: Record) -> str:
    """Passes of the fast layers, by shape."""
    names = {run["run"]: run for run in record["runs"]}
    before = {run["run"]: f"{run['tokens_per_second']:,}" for run in record.get("before", ())}
    rows = []
    for name, run in names.items():
        shape, recompute, *_ = name.split(":")
        low, high = run["range"]
        rate = f"{run['tokens_per_second']:,} ({low:,}–{high:,})"
        row = [shape, recompute, rate, f"{run['peak_gib']:.1f}", f"{run['of_matrix_rate']:.0%}"]
        rows.append([*row, before.get(name, "–")] if before else row)
    head = ["shape", "recompute", "tokens/s (range)", "peak GiB", "of the matrix rate"]
    head += ["tokens/s before"] if before else []
    return table(head, rows) + "\n" + where(record)


def by_shape(records: list[Record]) -> str:
    """Training of models of shapes.py by train.py and by its peers."""
    rows = []
    for record in records:
        for row in (row for row in record["rows"] if "epoch_seconds" in row):
            of_steps = row["step_tokens_per_second"]
            begins = row.get("start_to_first_step_seconds")
            rows.append([
                record["shape"], record["device"], row["name"], f"{row['useful_tokens_per_second']:,.0f}",
                f"{of_steps['median']:,.0f} ({of_steps['slowest']:,.0f}–{of_steps['fastest']:,.0f})", f"{row['peak_bytes'] / 2**30:.1f}", f"{row['utilisation']:.1%}",
                f"{begins:.0f}" if begins else "–",
            ])  # fmt: skip
    head = [
        "shape", "machine", "system", "useful tokens/s", "of the median step (range)", "peak GiB", "utilisation", "s to the first step",
    ]  # fmt: skip
    return table(head, rows) + "\n" + "\n".join(where(record) for record in records)


def generation(records: list[Record]) -> str:
    """Answers and the likelihoods of all references, by model; stock makes the answers alone."""
    rows = [
        [
            model_of(record), f"{record['replies']:,}", str(record["new_tokens"]), row["name"], f"{row['seconds']:.1f}",
            f"{row.get('decode_seconds', row['seconds']):.1f}", f"{row['replies_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**30:.1f}",
        ]
        for record in records
        for row in record["rows"]
    ]  # fmt: skip
    head = ["model", "replies", "tokens of each, at most", "system", "s", "of them decoding", "replies/s", "peak GiB"]
    return table(head, rows) + "\n\nEach row is a single run.\n" + "\n".join(where(record) for record in records)


def model_of(record: Record) -> str:
    """The shape that a record of benchmarks/generate.py names, or the model of its config."""
    shape: str | None = record.get("shape")
    return shape or record["command"].partition("--config configs/")[2].partition(".yaml")[0]


def decoding_products(record: Record) -> str:
    """Milliseconds of a product with few rows, by layer: bitsandbytes' fused one and that with dense weights."""
    counts = sorted({row["rows"] for row in record["rows"]})
    taken = {(row["layer"], row["rows"]): row for row in record["rows"]}
    rows = []
    for layer, shape in {row["layer"]: row["shape"] for row in record["rows"]}.items():
        for key, weights in (("fused_ms", "4 bit, fused"), ("dense_ms", "dense")):
            times = [f"{taken[layer, count][key]:.3f}" for count in counts]
            rows.append([f"{layer}, {shape[0]:,} × {shape[1]:,}", weights, *times])
    head = ["layer", "weights", *(f"{count} row{'s' if count > 1 else ''}, ms" for count in counts)]
    return table(head, rows) + "\n" + where(record)


def ties(records: list[Record]) -> str:
    """Greedy answers that are transformers' own, and those that part at a tie of the compute type."""
    rows = [
        [
            record["model"], record["compute_dtype"], f"{record['answers']:,}", f"{record['tokens']:,}", f"{record['equal']:,}",
            f"{record['equal_in_batches']:,}",
            f"{record['exact_ties']:,}", f"{record['within_two_spacings'] - record['exact_ties']:,}",
            f"{record['answers'] - record['equal'] - record['within_two_spacings']:,}",
        ]
        for record in records
    ]  # fmt: skip
    head = [
        "model", "compute type", "answers", "tokens", "equal", "equal, by transformers in batches", "part at equal logits", "part at 1 or 2 spacings", "part at more",
    ]  # fmt: skip
    return table(head, rows, numeric=True) + "\n" + "\n".join(where(record) for record in records)


def peaks(record: Record) -> str:
    """The dry run's peak beside the measured one."""
    rows = [
        [
            row["shape"], row["recompute"], row["tokens"] if row["tokens"] == "auto" else f"{row['tokens']:,}",
            f"{row['estimate_gib']:.2f}", f"{row['measured_gib']:.2f}",
            f"{row['estimate_gib'] / row['measured_gib'] - 1:+.1%}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    head = ["shape", "recompute, or generation", "tokens in a pass", "estimate, GiB", "measured, GiB", "difference"]
    return table(head, rows) + "\n" + where(record)


def preprocessing(records: list[Record]) -> str:
    """Preprocessing of generated corpora of several sizes."""
    ordered = sorted(records, key=lambda row: row["dialogues"])
    rows = [
        [
            f"{row['dialogues']:,}", f"{row['seconds']:,.0f}", f"{row['cpu_seconds']:,.0f}",
            f"{row['dialogues_a_second']:,}", f"{row['peak_resident_bytes'] / 2**20:,.0f}",
        ]
        for row in ordered
    ]  # fmt: skip
    head = ["dialogues", "s", "processor s", "dialogues/s", "peak MiB"]
    last = ordered[-1]
    return table(head, rows) + "\n" + where({**last, "device": last["machine"]["processor"]})


def scoring(records: list[Record]) -> str:
    """The time and memory of evaluate.py."""
    ordered = sorted(records, key=lambda row: row["replies"])
    rows = [
        [
            f"{row['replies']:,}", f"{row['dialogues']:,}", str(row["systems"]), f"{row['resamples']:,}",
            f"{row['seconds']:,.1f}", f"{row['processor_seconds']:,.1f}", f"{row['load']:.1f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in ordered
    ]  # fmt: skip
    head = ["replies of each system", "dialogues", "systems", "resamples", "s", "processor s", "load", "peak MiB"]
    told = f"The quickest of {' and '.join(str(len(record['runs'])) for record in ordered)} runs; load: of the whole machine."
    return table(head, rows, numeric=True) + f"\n\n{told}\n" + "\n".join(where(record) for record in ordered)


BLOCKS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "training on a GPU": ("train-gpu.json", training),
    "training on a GPU, for longer": ("train-gpu-longer.json", training),
    "training on a GPU, today": ("train-gpu-today.json", training),
    "training on a smaller GPU": ("train-gpu-h100.json", training),
    "how runs vary": ("train-gpu*.json", repeated),
    "training on a CPU": ("train-cpu.json", training),
    "waterfall": ("waterfall.json", waterfall),
    "training by shape": ("train-shape-*.json", by_shape),
    "layers": ("layers-h100.json", layers),
    "layers today": ("layers-h200.json", layers),
    "estimates": ("peaks.json", peaks),
    "generation": ("generate-*.json", generation),
    "ties": ("ties-*.json", ties),
    "decoding products": ("decoding-products.json", decoding_products),
    "scoring": ("evaluate*.json", scoring),
    "preprocessing": ("preprocess-*.json", preprocessing),
}


def blocks() -> dict[str, str]:
    """The content of each block."""
    contents = {}
    for name, (pattern, content) in BLOCKS.items():
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]
        contents[name] = content(records if "*" in pattern else records[0]) if records else "Not measured yet."
    return contents


def main() -> int:
    fill_page("docs/performance.md", blocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())
