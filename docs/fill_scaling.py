"""Fills the tables of docs/scaling.md: estimates from speeds measured on one GPU and assumed speeds of links.

    make performance

A step on n GPUs takes t(n) = p a + k b + 2 (n-1)/n G / r: the busiest GPU computes k tokens in p passes, then G bytes of
gradients are all-reduced over a link of r bytes per second. a and b, the seconds per pass and per token, come from a line
through two measured configs that differ only in the size of their passes.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from blocks import ROOT, fill_page, table

MEASURED = ROOT / "benchmarks" / "results" / "train-gpu.json"
TWO_CARDS_MEASURED = ROOT / "benchmarks" / "results" / "two-cards.json"
TWO_CARDS = {
    "one_again": "one GPU",
    "ddp": "two GPUs, the same 32 dialogues a step",
    "ddp_twice_the_batch": "two GPUs, 64 dialogues a step",
    "two_machines": "two launchers of one GPU each, as on two machines",
    "sharded": "two GPUs, base sharded",
    "sharded_resumes": "the same, resumed at step 12 by two",
    "sharded_resumed_by_one": "the same, resumed at step 12 by one GPU, not sharded",
    "large": "Falcon-40B's shape, two GPUs, sharded, `device_memory: 24GiB`",
}
PASSES = {"kestrel": 3072, "kestrel-8gb-card": 1536}  # training.tokens_per_step of the two configs
CONFIGS = ("kestrel-max-throughput", "kestrel", "kestrel-8gb-card")
DIALOGUES_A_STEP = 32
GRADIENTS = 4 * 4_718_592  # bytes: float32, LoRA of r 16 on query_key_value
PACKED = 6_625_951_744 // 2  # bytes of Falcon-7B's 4-bit weights
# Bytes per second in each direction during an all-reduce of this size. Assumed: about two thirds of the nominal rate.
LINKS = {"NVLink": 200e9, "PCIe 4 x16": 20e9, "Ethernet, 100 Gb/s": 8e9, "Ethernet, 10 Gb/s": 0.8e9}
START = 60.0  # seconds to import, load, quantize and audit, on any number of GPUs; assumed
GPUS = (1, 2, 4, 8, 16)
CORPORA = (300, 1_000, 3_000, 18_000, 100_000, 1_000_000)  # dialogues
ENOUGH = 0.7  # share of the ideal speedup that makes n GPUs worthwhile


class Model:
    """Seconds per step and per run, from a record of benchmarks/train.py."""

    def __init__(self, record: dict[str, Any]):
        self.rates = {row["name"]: float(row["useful_tokens_per_second"]) for row in record["rows"]}
        (large, long), (small, short) = ((PASSES[name], PASSES[name] / self.rates[name]) for name in PASSES)
        self.a_token = (long - short) / (large - small)
        self.a_pass = long - large * self.a_token
        self.tokens = record["tokens"] / record["dialogues"]

    def computing(self, gpus: int) -> float:
        """Seconds that the busiest GPU computes in a step."""
        tokens = math.ceil(DIALOGUES_A_STEP / gpus) * self.tokens
        return math.ceil(tokens / PASSES["kestrel"]) * self.a_pass + tokens * self.a_token

    def step(self, gpus: int, rate: float) -> float:
        return self.computing(gpus) + reducing(gpus, rate)

    def run(self, gpus: int, rate: float, dialogues: int) -> float:
        """Seconds of one epoch, including the start."""
        return START + math.ceil(dialogues / DIALOGUES_A_STEP) * self.step(gpus, rate)

    def worthwhile(self, rate: float, dialogues: int) -> int:
        alone = self.run(1, rate, dialogues)
        return max(n for n in GPUS if alone / (n * self.run(n, rate, dialogues)) >= ENOUGH or n == 1)


def reducing(gpus: int, rate: float) -> float:
    """Seconds of an all-reduce in a ring, in which each GPU sends and receives 2 (n-1)/n of the data."""
    return 2 * (gpus - 1) / gpus * GRADIENTS / rate


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def measured(record: dict[str, Any], model: Model) -> str:
    """The measured speeds, and a and b."""
    rows = [[f"`{r['config']}`", f"{model.rates[r['name']]:,.0f}"] for r in record["rows"] if r["name"] in CONFIGS]
    versions = record["versions"]
    where = (
        f"{record['device']}, torch {versions['torch']}, transformers {versions['transformers']}, {record['date']}; "
        f"{model.tokens:.0f} tokens per dialogue"
    )
    line = f"a = {1e3 * model.a_pass:.1f} ms per pass, b = {1e6 * model.a_token:.1f} µs per token"
    return table(["config", "useful tokens/s on one GPU"], rows) + f"\n\n{where}. From the last two: {line}."


def steps(model: Model) -> str:
    """The time of a step of 32 dialogues."""
    rows = []
    for n in GPUS:
        reductions = [f"{1e3 * reducing(n, rate):.1f}" for rate in LINKS.values()]
        slowest = min(LINKS.values())
        gains = [f"{model.step(1, rate) / model.step(n, rate):.1f}" for rate in (max(LINKS.values()), slowest)]
        rows.append([str(n), f"{1e3 * model.computing(n):.0f}", *reductions, *gains])
    head = ["GPUs", "computing, ms", *(f"{name}, ms" for name in LINKS), "speedup, NVLink", "speedup, 10 Gb/s"]
    return table(head, rows)


def corpora(model: Model) -> str:
    """How many GPUs are worth using for how many dialogues."""
    rows = []
    for dialogues in CORPORA:
        cells = [f"{dialogues:,}", _time(model.run(1, 1.0, dialogues))]
        for name in ("NVLink", "Ethernet, 10 Gb/s"):
            best = model.worthwhile(LINKS[name], dialogues)
            cells.append(f"{best}: {_time(model.run(best, LINKS[name], dialogues))}")
        rows.append(cells)
    return table(["dialogues", "one GPU", "GPUs, with NVLink", "GPUs, with 10 Gb/s"], rows)


def sharding(model: Model) -> str:
    """The cost of gathering a sharded base in every pass."""
    computing = model.a_pass + PASSES["kestrel"] * model.a_token
    rows = []
    for name, rate in LINKS.items():
        gathering = 2 * PACKED * 7 / 8 / rate
        rows.append([name, f"{1e3 * gathering:,.0f}", f"{1e3 * computing:,.0f}", f"{gathering / computing:.1f}"])
    return table(["link", "gathering, ms per pass", "computing, ms per pass", "ratio"], rows)


def two_cards(record: dict[str, Any]) -> str:
    """What benchmarks/two_cards.py measured."""
    rows = []
    for key, what in TWO_CARDS.items():
        row = record[key]
        median, least, most = (f"{rate:,}" for rate in row["tokens_per_second"])
        peaks = " and ".join(f"{peak:.1f}" for peak in row["peak_gib"])
        loss = f"{row['losses'][-1]:.4f}" if key not in ("ddp_twice_the_batch", "large") else "-"
        rows.append([what, f"{median} ({least} to {most})", peaks, loss])
    planned = float(record["large"]["dry_run"][0].split()[-1])
    versions = record["versions"]
    return (
        table(["training", "tokens/s: median (range)", "peak GiB", "loss at step 24"], rows)
        + f"\n\n{record['device']}, torch {versions['torch']}, transformers {versions['transformers']}, bitsandbytes "
        f"{versions['bitsandbytes']}. The dry run had said {planned:.1f} GiB for Falcon-40B. When one of two processes was killed, the "
        f"other had ended {record['killed']['seconds_to_end']} s later. The answers of two processes were "
        f"{'byte for byte' if record['answers']['same_bytes'] else 'not'} those of one."
    )


def blocks() -> dict[str, str]:
    """The content of each block."""
    record = json.loads(MEASURED.read_text(encoding="utf-8"))
    model = Model(record)
    return {
        "measured": measured(record, model),
        "steps": steps(model),
        "corpora": corpora(model),
        "sharding": sharding(model),
        "cards": two_cards(json.loads(TWO_CARDS_MEASURED.read_text(encoding="utf-8"))),
    }


def main() -> int:
    fill_page("docs/scaling.md", blocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())
