"""Writes the tables of docs/scaling.md: arithmetic on figures that were measured on one GPU, and on assumed rates of links.

    make performance

The model is t(n) = p a + k b + 2 (n-1)/n G / r for a step on n GPUs: k tokens on the GPU that has most, in p passes, and the
all-reduce of G bytes of gradients over a link of r bytes a second. a and b, the seconds of a pass and of a token, are those
of a line through two measured configs that differ in the size of their passes alone.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "train-gpu.json"
PASSES = {"kestrel": 3072, "kestrel-8gb-card": 1536}  # training.tokens_per_step of the two configs
CONFIGS = ("kestrel-max-throughput", "kestrel", "kestrel-8gb-card")
DIALOGUES_A_STEP = 32
GRADIENTS = 4 * 4_718_592  # bytes: float32, LoRA of r 16 on query_key_value
PACKED = 6_625_951_744 // 2  # bytes of Falcon-7B's 4-bit weights
# Bytes a second that an all-reduce of this size moves each way. Assumed, not measured: about two thirds of the nominal rate.
LINKS = {"NVLink": 200e9, "PCIe 4 x16": 20e9, "Ethernet, 100 Gb/s": 8e9, "Ethernet, 10 Gb/s": 0.8e9}
START = 60.0  # seconds to import, load, quantize and audit, which no GPU shortens; assumed
GPUS = (1, 2, 4, 8, 16)
CORPORA = (300, 1_000, 3_000, 18_000, 100_000, 1_000_000)  # dialogues
ENOUGH = 0.7  # of what n GPUs could save at best


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


class Model:
    """Seconds of steps and runs, from a record of benchmarks/train.py."""

    def __init__(self, record: dict[str, Any]):
        self.rates = {row["name"]: float(row["useful_tokens_per_second"]) for row in record["rows"]}
        (large, long), (small, short) = ((PASSES[name], PASSES[name] / self.rates[name]) for name in PASSES)
        self.a_token = (long - short) / (large - small)
        self.a_pass = long - large * self.a_token
        self.tokens = record["tokens"] / record["dialogues"]

    def computing(self, gpus: int) -> float:
        """Of one step, on the GPU that has most."""
        tokens = math.ceil(DIALOGUES_A_STEP / gpus) * self.tokens
        return math.ceil(tokens / PASSES["kestrel"]) * self.a_pass + tokens * self.a_token

    def step(self, gpus: int, rate: float) -> float:
        return self.computing(gpus) + reducing(gpus, rate)

    def run(self, gpus: int, rate: float, dialogues: int) -> float:
        """Of one epoch, start included."""
        return START + math.ceil(dialogues / DIALOGUES_A_STEP) * self.step(gpus, rate)

    def that_pay(self, rate: float, dialogues: int) -> int:
        alone = self.run(1, rate, dialogues)
        return max(n for n in GPUS if alone / (n * self.run(n, rate, dialogues)) >= ENOUGH or n == 1)


def reducing(gpus: int, rate: float) -> float:
    """Seconds of an all-reduce in a ring, in which each GPU sends and receives 2 (n-1)/n of the data."""
    return 2 * (gpus - 1) / gpus * GRADIENTS / rate


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def measured(record: dict[str, Any], model: Model) -> str:
    """What it all rests on."""
    rows = [[f"`{r['config']}`", f"{model.rates[r['name']]:,.0f}"] for r in record["rows"] if r["name"] in CONFIGS]
    versions = record["versions"]
    where = (
        f"{record['device']}, torch {versions['torch']}, transformers {versions['transformers']}, {record['date']}; "
        f"{model.tokens:.0f} tokens a dialogue"
    )
    line = f"a = {1e3 * model.a_pass:.1f} ms a pass, b = {1e6 * model.a_token:.1f} µs a token"
    return _table(["config", "useful tokens/s on one GPU"], rows) + f"\n\n{where}. From the last two: {line}."


def steps(model: Model) -> str:
    """One step of 32 dialogues."""
    rows = []
    for n in GPUS:
        reductions = [f"{1e3 * reducing(n, rate):.1f}" for rate in LINKS.values()]
        slowest = min(LINKS.values())
        gains = [f"{model.step(1, rate) / model.step(n, rate):.1f}" for rate in (max(LINKS.values()), slowest)]
        rows.append([str(n), f"{1e3 * model.computing(n):.0f}", *reductions, *gains])
    head = ["GPUs", "computing, ms", *(f"{name}, ms" for name in LINKS), "× faster by NVLink", "× faster by 10 Gb/s"]
    return _table(head, rows)


def corpora(model: Model) -> str:
    """How many GPUs pay."""
    rows = []
    for dialogues in CORPORA:
        cells = [f"{dialogues:,}", _time(model.run(1, 1.0, dialogues))]
        for name in ("NVLink", "Ethernet, 10 Gb/s"):
            best = model.that_pay(LINKS[name], dialogues)
            cells.append(f"{best}: {_time(model.run(best, LINKS[name], dialogues))}")
        rows.append(cells)
    return _table(["dialogues", "one GPU", "GPUs that pay by NVLink", "GPUs that pay by 10 Gb/s"], rows)


def sharding(model: Model) -> str:
    """A base that is gathered again and again."""
    computing = model.a_pass + PASSES["kestrel"] * model.a_token
    rows = []
    for name, rate in LINKS.items():
        gathering = 2 * PACKED * 7 / 8 / rate
        rows.append([name, f"{1e3 * gathering:,.0f}", f"{1e3 * computing:,.0f}", f"{gathering / computing:.1f}"])
    return _table(["link", "gathering, ms a pass", "computing, ms a pass", "ratio"], rows)


def filled(text: str) -> str:
    """The page with its tables made anew."""
    record = json.loads(MEASURED.read_text(encoding="utf-8"))
    model = Model(record)
    blocks = {
        "measured": measured(record, model),
        "steps": steps(model),
        "corpora": corpora(model),
        "sharding": sharding(model),
    }
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- {name}: made by make performance -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"docs/scaling.md has {count} blocks {name}")
    return text


def main() -> int:
    page = ROOT / "docs" / "scaling.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
