"""Trains the same dialogues in bfloat16 and in float16, and holds the losses of the steps against each other.

    python benchmarks/compute_dtypes.py --model FOLDER --text FILE --output benchmarks/results/compute-dtypes.json
    KESTREL_CARD=sm_75 python benchmarks/compute_dtypes.py --model FOLDER --text FILE --dtypes float16 float16

The model is a folder, such as one that falcon_7b_shape.py wrote. The first type is the reference; the mean difference of
the steps' losses from it must stay within 1%. KESTREL_CARD gives the run the limits of another card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine
from benchmarks.options import at_least_one, command_of, parser_of, told
from kestrel.errors import KestrelError
from kestrel.runtime.atomic import write_json

_ALLOWED = 0.01


def run(name: str, arguments: list[str]) -> str:
    """What one of the scripts prints.

    Raises:
        KestrelError: it failed.
    """
    command = [sys.executable, str(ROOT / name), *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise KestrelError(f"{name} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def losses_of(run_dir: Path) -> list[float]:
    lines = (run_dir / "logs" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def train(dtype: str, run_dir: Path, options: Any) -> dict[str, Any]:
    """One run: its losses, its time, and how many steps the scaler skipped."""
    given = {
        "run_dir": run_dir,
        "data.source": options.text,
        "model.name": options.model,
        "quantization.compute_dtype": dtype,
        "lora.target_modules": "all-linear",
        "training.max_steps": options.steps,
        "training.batch_size": options.batch_size,
        "training.logging_steps": 1,
        "training.evaluations": 1,
        "training.samples": 0,
        "training.resume": "never",
    }
    arguments = [
        "--config",
        options.config,
        *(item for key, value in given.items() for item in (f"--{key}", str(value))),
    ]
    run("preprocess.py", arguments)
    began = time.monotonic()
    printed = run("train.py", [*arguments, "--training.report_to"])
    told_by_run = [line for line in printed.splitlines() if line.startswith(("layers:", "attention:", "compute type:"))]
    skipped = printed.count(" was skipped: ")
    print(f"{dtype}: {time.monotonic() - began:.0f} s, {skipped} steps skipped", *told_by_run, sep="\n  ", flush=True)
    return {"dtype": dtype, "losses": losses_of(run_dir), "skipped": skipped, "printed": told_by_run}


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--config", default="configs/falcon-7b.yaml", help="of the runs")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="the first is the reference")
    parser.add_argument("--steps", type=at_least_one, default=50, help="optimizer steps")
    parser.add_argument("--batch-size", type=at_least_one, default=16, help="dialogues of a step")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args(argv)

    def work() -> int:
        with tempfile.TemporaryDirectory() as folder:
            rows = [train(dtype, Path(folder) / f"{n}", options) for n, dtype in enumerate(options.dtypes)]
        reference = rows[0]["losses"]
        for row in rows:
            pairs = list(zip(row["losses"], reference, strict=True))
            row["apart"] = sum(abs(found / expected - 1) for found, expected in pairs) / len(pairs)
            print(
                f"{row['dtype']}: losses {row['apart']:.3%} from {rows[0]['dtype']}'s; the last {row['losses'][-1]:.4f}"
            )
        record = {
            **machine.facts_of_a_measurement(command_of("compute_dtypes.py", argv)),
            "card": os.environ.get("KESTREL_CARD"),
            "rows": rows,
        }
        if options.output:
            write_json(options.output, record)
        return int(any(row["apart"] > _ALLOWED for row in rows))

    return told(work)


if __name__ == "__main__":
    sys.exit(main())
