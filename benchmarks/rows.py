"""What is said of a measured system: a row of the record and of the table."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.profiles import System

_MORE = (
    "start_to_first_step_seconds",
    "allocator_retries",
    "estimated_bytes",
    "tokens_per_step",
    "recompute",
    "versions",
)  # of some systems


def row_of(system: System, result: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What the record says of one system.

    Args:
        system: as it ran.
        result: from `systems.measure`, or why there is none.
        facts: from `systems.prepare`.
    """
    if "seconds" not in result:
        return {**asdict(system), **result}
    tokens_a_second = result["tokens"] / result["seconds"]
    return {
        **asdict(system),
        "epoch_seconds": facts["tokens"] / tokens_a_second,
        "timed_share_of_epoch": result["tokens"] / facts["tokens"],
        "useful_tokens_per_second": tokens_a_second,
        "dialogues_per_second": result["dialogues"] / result["seconds"],
        "padding_share": 1 - result["real"] / result["positions"],
        "peak_bytes": result["peak_bytes"],
        "utilisation": 4 * facts["linear_parameters"] * tokens_a_second / facts["matrix_flops"],
        "loss_difference": result["loss_difference"],
        "gradient_difference": result.get("gradient_difference"),
        "seconds_timed": result["seconds"],
        "processor_seconds_timed": result["processor_seconds"],
        **{key: result[key] for key in _MORE if key in result},
        **_of_steps(result),
    }


def _of_steps(result: dict[str, Any]) -> dict[str, Any]:
    """Useful tokens a second of the timed steps, where each was timed: the median one, the slowest and the fastest."""
    pairs = zip(result.get("step_tokens", ()), result.get("step_seconds", ()), strict=True)
    rates = [tokens / seconds for tokens, seconds in pairs]
    if not rates:
        return {}
    return {"step_tokens_per_second": {"median": median(rates), "slowest": min(rates), "fastest": max(rates)}}


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown. The last column is the epoch's time over that of the first row."""
    head = (
        "system", "s an epoch", "useful tokens/s", "of the median step (range)", "dialogues/s", "padding", "peak GiB",
        "utilisation", "× first",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    first = next((row["epoch_seconds"] for row in record["rows"] if "epoch_seconds" in row), 0.0)
    for row in record["rows"]:
        if "epoch_seconds" not in row:
            why = row.get("failed") or row.get("disagrees") or "out of memory"
            lines.append(f"| {row['name']} | not timed: {why.strip().splitlines()[-1]} |" + " |" * (len(head) - 2))
            continue
        steps = row.get("step_tokens_per_second")
        each = f"{steps['median']:,.0f} ({steps['slowest']:,.0f} to {steps['fastest']:,.0f})" if steps else ""
        cells = (
            row["name"], f"{row['epoch_seconds']:,.1f}", f"{row['useful_tokens_per_second']:,.0f}", each,
            f"{row['dialogues_per_second']:.2f}", f"{row['padding_share']:.1%}", f"{row['peak_bytes'] / 2**30:.1f}",
            f"{row['utilisation']:.1%}", f"{row['epoch_seconds'] / first:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
