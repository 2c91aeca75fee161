"""Holds `--dry-run`'s estimates of memory against peaks measured on a GPU, for shapes of well-known models.

    python benchmarks/peaks.py --text DIALOGUES --output benchmarks/results/peaks.json [--shapes qwen2.5-7b ...]

Each model is written with random weights (benchmarks/shapes.py), and trained a few steps for each value of
training.recompute, with LoRA on all linear layers. Then its adapter answers the training dialogues with as many tokens in a
pass, and with auto; random weights end no answer early. A difference of more than a tenth ends with status 1. Without a
GPU: `--shapes tiny` tries the script, and resident memory is what it shows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.options import at_least_one, command_of, parser_of, told
from benchmarks.shapes import SHAPES
from kestrel.planning.memory import CONTEXT

_SHAPES = ("falcon-7b", "qwen2.5-7b", "llama-3.1-8b", "mistral-7b", "gemma-2-9b", "smollm2-135m")
_TRAINING, _GENERATION = ("dense", "none", "mlp", "full"), ("generation", "generation-auto")
_ALLOWED = 0.1
_MARK = "measured: "
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # the dry run would time passes on one


def call(script: str, *arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What one of the scripts took, and what it printed.

    Raises:
        KestrelError: it failed.
    """
    from kestrel.errors import KestrelError

    command = [sys.executable, str(ROOT / "benchmarks" / "chain.py"), "--here", script, "--", *arguments]
    given = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KestrelError(f"{script}.py failed:\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith(_MARK))
    return dict(json.loads(line.removeprefix(_MARK))), done.stdout


def peak_of(facts: dict[str, Any]) -> float:
    """GiB."""
    return round(facts.get("peak_gpu_bytes", facts["peak_resident_bytes"]) / 2**30, 2)


def estimate_of(printed: str) -> float:
    """GiB that the dry run names as the peak of all tensors."""
    found = re.search(r"peak of all tensors\s+([\d.]+)", printed)
    assert found is not None, printed
    in_mib = re.search(r"by estimate\s+MiB", printed)
    return round(float(found[1]) / (2**10 if in_mib else 1), 2)


def rows_of(shape: str, work: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each of `--what`. Where only generation is asked for, the adapter's training still has a row."""
    model, run = work / "model", work / "run"
    written = [sys.executable, str(ROOT / "benchmarks" / "shapes.py"), "--shape", shape, "--output", str(model)]
    subprocess.run([*written, "--text", options.text], check=True, stdout=subprocess.DEVNULL)
    common = ["--config", str(ROOT / options.config), "--run_dir", str(run), "--data.source", options.text]
    common += ["--model.name", str(model), "--lora.target_modules", "all-linear"]
    training = ["--training.max_steps", str(options.steps), "--training.tokens_per_step", str(options.tokens)]
    training += ["--training.batch_size", "64", "--training.evaluations", "1", "--training.samples", "0"]
    training += ["--training.resume", "never"]
    call("preprocess", *common)
    for level in [level for level in _TRAINING if level in options.what] or ["full"]:
        given = [*common, *training, "--training.recompute", level]
        _, printed = call("train", *given, "--training.device_memory", "140GiB", "--dry-run", **_NO_GPU)
        facts, _ = call("train", *given)
        row = {"shape": shape, "recompute": level, "tokens": options.tokens}
        yield {**row, "estimate_gib": estimate_of(printed), "measured_gib": peak_of(facts)}
    for what in [what for what in _GENERATION if what in options.what]:
        tokens = options.tokens if what == "generation" else "auto"
        given = [*common, "--generation.systems", "adapter", "--generation.split", "train"]
        given += ["--generation.tokens_per_step", str(tokens)]
        _, printed = call("generate", *given, *_named_memory(), "--dry-run", **_NO_GPU)
        facts, _ = call("generate", *given)
        shutil.rmtree(run / "generations")
        row = {"shape": shape, "recompute": "generation", "tokens": tokens}
        yield {**row, "estimate_gib": estimate_of(printed), "measured_gib": peak_of(facts)}


def _named_memory() -> list[str]:
    """The card's free memory, which auto depends on, named to a process that does not see the card."""
    asked = "import torch; print(torch.cuda.mem_get_info()[0] >> 20 if torch.cuda.is_available() else '')"
    free = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    return ["--training.device_memory", f"{int(free) + (CONTEXT >> 20)}MiB"] if free else []


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(_SHAPES))
    parser.add_argument("--config", default="configs/falcon-7b.yaml", help="of the runs")
    told_of, every = "training with these values of training.recompute, and generation", [*_TRAINING, *_GENERATION]
    parser.add_argument("--what", nargs="+", choices=every, default=every, help=told_of)
    parser.add_argument("--tokens", type=at_least_one, default=4096, help="of a pass")
    parser.add_argument("--steps", type=at_least_one, default=3, help="of each training")
    parser.add_argument("--output", type=Path, help="JSON file of the results, written after every shape")
    options = parser.parse_args(argv)
    return told(lambda: measure(options, command_of("peaks.py", argv)))


def measure(options: argparse.Namespace, command: str) -> int:
    """Returns:
    1 where an estimate is further than a tenth from what was measured, else 0.
    """
    from benchmarks import machine
    from kestrel.runtime.atomic import write_json

    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        work = Path(tempfile.mkdtemp(prefix="peaks-"))
        began = time.monotonic()
        try:
            for row in rows_of(shape, work, options):
                rows.append(row)
                print(row, flush=True)
                if options.output:
                    write_json(options.output, {**machine.facts_of_a_measurement(command), "rows": rows})
        finally:
            shutil.rmtree(work)
        print(f"{shape}: {time.monotonic() - began:.0f} s", flush=True)
    return int(any(abs(row["estimate_gib"] / row["measured_gib"] - 1) > _ALLOWED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
