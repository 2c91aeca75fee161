"""Fills the tables of docs/hardware.md from the records in benchmarks/results.

make performance
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from blocks import ROOT, fill_page, table

sys.path.insert(0, str(ROOT))

from kestrel.model.kernels.cards import SHARED_MEMORY

RECORDS = (
    "train-gpu-today.json", "train-gpu-h100.json", "layers-h100.json", "layers-h200.json",
    "train-shape-qwen2.5-7b.json", "train-shape-llama-3.1-8b.json", "train-shape-mistral-7b.json",
    "train-shape-smollm2-135m.json", "two-cards.json", "compute-dtypes.json", "t4.json", "train-cpu.json",
)  # fmt: skip
COMPILED = {
    "sm_75": "T4, RTX 20", "sm_80": "A100", "sm_86": "RTX 30, A10", "sm_89": "RTX 40, L4", "sm_90": "H100, H200",
    "sm_100": "B200", "sm_120": "RTX 50",
}  # fmt: skip


def results_of(record: dict[str, Any]) -> list[str]:
    """Kestrel's lines of a record: what ran, tokens or replies per second, GiB at the peak."""
    lines = []
    for row in record.get("rows", []):
        if row.get("kind") == "kestrel" and "peak_bytes" in row:
            name = " ".join(filter(None, (record.get("shape"), row["name"])))
            speed = f"{row['useful_tokens_per_second']:,.0f} tokens/s, " if "useful_tokens_per_second" in row else ""
            lines.append(f"{name}: {speed}{row['peak_bytes'] / 2**30:.1f} GiB")
    for run in record.get("runs", []):
        lines.append(f"{run['run']}: {run['tokens_per_second']:,} tokens/s, {run['peak_gib']:.1f} GiB")
    for name in ("one", "two", "sharded", "large"):
        if isinstance(found := record.get(name), dict) and "tokens_per_second" in found:
            speed = median(found["tokens_per_second"])
            lines.append(f"{name}: {speed:,.0f} tokens/s, {max(found['peak_gib']):.1f} GiB a card")
    return lines


def other_dtypes(record: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Lines of a record of benchmarks/compute_dtypes.py, by type and attention; those that bfloat16 is compared with aside."""
    found: dict[tuple[str, str], list[str]] = {}
    for model, runs in record.get("models", {}).items():
        for run in runs:
            if run["dtype"] != "bfloat16":
                attention = f"torch's, under `KESTREL_CARD={run['card']}`" if run["card"] else "Triton"
                line = f"{model}: {len(run['losses'])} steps, losses on average {run['apart']:.2%} from bfloat16's"
                line += f" ({record['note']})" if "note" in record else ""
                found.setdefault((run["dtype"], attention), []).append(line)
    return found


def tried() -> str:
    rows = []
    for name in RECORDS:
        record = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
        attention = "Triton" if "NVIDIA" in record["device"] else "torch"
        attention = f"torch's, under `KESTREL_CARD={record['card']}`" if record.get("card") else attention
        made = f"`benchmarks/results/{name}`" + (f", {record['date']}" if record.get("date") else "")
        lines = {(record.get("compute_dtype", "bfloat16"), attention): results_of(record), **other_dtypes(record)}
        rows += [[record["device"], *kind, "<br>".join(found), made] for kind, found in lines.items() if found]
    return table(["card", "type", "attention", "what ran", "record"], rows)


def compiled() -> str:
    """Limits to which each generation's kernels are held by tests/model/test_compiled_kernels.py."""
    rows = []
    for name, cards in COMPILED.items():
        capability = int(name[3:-1]), int(name[-1])
        attention = "torch's" if capability < (8, 0) else "Triton's where it fits the head size"
        kind = "float16" if capability < (8, 0) else "bfloat16"
        rows.append([cards, name, f"{SHARED_MEMORY[capability]:,}", kind, attention])
    return table(["cards", "capability", "bytes of shared memory", "`compute_dtype: auto`", "attention"], rows)


def blocks() -> dict[str, str]:
    return {"tried": tried(), "compiled": compiled()}


def main() -> int:
    fill_page("docs/hardware.md", blocks())
    return 0


if __name__ == "__main__":
    sys.exit(main())
