"""Holds `train.py --dry-run`'s estimate of memory against the peaks that benchmarks/train.py measured on a GPU.

    python benchmarks/estimates.py --measured benchmarks/results/train-gpu.json --text FILE \\
        --output benchmarks/results/estimates.json

No GPU is needed and no weights are made: the estimate is for Falcon-7B's shape, the same dialogues, configs and steps. A
difference of more than a tenth ends with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine
from benchmarks.falcon_7b_shape import write_tokenizer
from benchmarks.profiles import PROFILES, System, arguments, read_dialogues, script, write_dialogues
from kestrel.runtime.atomic import write_json

_ALLOWED = 0.1


def write_shape(folder: Path, text: Path) -> None:
    """A model folder without weights, with the tokenizer that falcon_7b_shape.py makes of a text."""
    from transformers import FalconConfig

    folder.mkdir()
    write_tokenizer(folder, iter(text.read_text(encoding="utf-8").splitlines()))
    FalconConfig(num_hidden_layers=32, bos_token_id=11, eos_token_id=11, dtype="bfloat16").save_pretrained(str(folder))


def estimated_peak(system: System, work: Path, memory: str) -> float:
    """GiB that the dry run names as the peak of all tensors."""
    command = arguments(work, work / "model", system, "bfloat16")
    if script("preprocess").main(command):
        raise SystemExit(f"preprocess.py failed for {system.name}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = script("train").main([*command[:-1], "--training.device_memory", memory, command[-1], "--dry-run"])
    found = re.search(r"peak of all tensors\s+([\d.]+)", printed.getvalue())
    if status or not found:
        raise SystemExit(f"train.py --dry-run failed for {system.name}:\n{printed.getvalue()}")
    return float(found[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="JSON of benchmarks/train.py --profile gpu")
    parser.add_argument("--text", type=Path, required=True, help="the file of dialogues that it was given")
    parser.add_argument("--device-memory", default="140GiB", help="of the card that it ran on")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args(argv)
    measured = json.loads(options.measured.read_text(encoding="utf-8"))
    profile = PROFILES["gpu"]
    dialogues = read_dialogues(str(options.text))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_shape(work / "model", options.text)
        write_dialogues(work / "dialogues", dialogues, profile.repeat)
        for row in measured["rows"]:
            if row["kind"] != "kestrel" or "peak_bytes" not in row:
                continue
            chosen = {
                name: row[name] for name in ("name", "kind", "batch_size", "warmup", "steps", "options", "config")
            }
            estimate, peak = estimated_peak(System(**chosen), work, options.device_memory), row["peak_bytes"] / 2**30
            rows.append({"config": row["config"], "estimate_gib": estimate, "measured_gib": peak})
            print(f"{row['config']}: estimate {estimate:.2f} GiB, measured {peak:.2f}, {estimate / peak - 1:+.1%}")
    record = {
        **machine.facts_of_a_measurement(
            "python benchmarks/estimates.py --measured benchmarks/results/train-gpu.json --text FILE",
            device=f"measured on {measured['device']}",
        ),
        "rows": rows,
    }
    if options.output:
        write_json(options.output, record)
    return int(any(abs(row["estimate_gib"] / row["measured_gib"] - 1) > _ALLOWED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
