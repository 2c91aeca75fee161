"""Trains and answers in two processes, and compares them with one: speed, losses, resuming, failures, and a sharded base.

    python benchmarks/two_cards.py --model FOLDER --dialogues FILE --output benchmarks/results/two-cards.json
    python benchmarks/two_cards.py --model FOLDER --dialogues FILE --output … --only sharded sharded_resumes
    python benchmarks/two_cards.py --model FOLDER --dialogues FILE --output … --large FOLDER      also a base for two cards

The model folder is one of falcon_7b_shape.py, the large one of `shapes.py --shape falcon-40b`. Each measurement is a call of the
scripts under torchrun, as docs/scaling.md tells it; the JSON is written after each. Without GPUs the processes compute on
the CPU: a trial of this script with a tiny model. Seconds of a step are from its start to the next one's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
_TIMED = "--timed"  # how this file calls itself as a process that trains
_WARM_UP = 3  # steps that are not counted


def timed_training(output: Path, argv: list[str]) -> int:
    """train.py, with the seconds and tokens of each step and the peak of memory written to a file for each process."""
    import numpy as np
    import torch

    import train
    from benchmarks.machine import synchronize
    from kestrel.runtime import distributed
    from kestrel.training.trainer import DialogueTrainer

    starts: list[float] = []
    tokens: list[int] = []
    own_step = DialogueTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        synchronize()
        starts.append(time.perf_counter())
        tokens.append(int(self.tokens_until[self.state.global_step]))  # of the steps up to this one
        return own_step(self, *args, **kwargs)

    DialogueTrainer.training_step = step  # type: ignore[method-assign]
    status = train.main(argv)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    # A step's seconds, until the next begins, and its tokens.
    rates = [n / (later - sooner) for (sooner, later), n in zip(pairwise(starts), np.diff([0, *tokens]), strict=False)]
    facts = {"tokens_per_second": rates, "peak_gib": peak}
    output.with_suffix(f".{distributed.rank()}").write_text(json.dumps(facts), encoding="utf-8")
    return status


class Bench:
    """Calls of the scripts, all over the same dialogues."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.work: Path = options.work
        self.common = ["--config", str(options.config), "--data.source", str(options.dialogues), *options.more]

    def arguments(self, name: str, model: Path, *more: str) -> list[str]:
        return [*self.common, "--model.name", str(model), "--run_dir", str(self.work / name), *more]

    def prepare(self, name: str, model: Path) -> None:
        """The dataset of a model, made once and linked by later runs."""
        if not (self.work / name).exists():
            subprocess.run(
                [sys.executable, "preprocess.py", *self.arguments(name, model)], check=True, stdout=subprocess.DEVNULL
            )

    def copy(self, source: str, name: str, *without: str) -> None:
        shutil.rmtree(self.work / name, ignore_errors=True)
        shutil.copytree(self.work / source, self.work / name)
        for part in without:
            shutil.rmtree(self.work / name / part)

    def train(
        self,
        name: str,
        *more: str,
        processes: int = 1,
        sharded: bool = False,
        machines: int = 1,
        model: Path | None = None,
    ) -> dict[str, Any]:
        """One training; its losses, the median tokens per second with its range, and each process's peak of memory."""
        facts = self.work / f"{name}.facts"
        command = [__file__, _TIMED, str(facts), *self.arguments(name, model or self.options.model, *more)]
        environment = {**os.environ, "ACCELERATE_USE_FSDP": "true"} if sharded else dict(os.environ)
        began = time.monotonic()
        started = launch(command, processes, machines, environment)
        said = "".join(process.communicate()[0] for process in started)
        result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        if any(process.returncode for process in started):
            return {**result, "failed": said[:1500] + said[-1500:]}
        measured = [json.loads(facts.with_suffix(f".{rank}").read_text()) for rank in range(processes)]
        rows = [json.loads(line) for line in (self.work / name / "logs" / "training.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "loss" in row]
        rates = sorted(measured[0]["tokens_per_second"][_WARM_UP:])
        result["said"] = [
            line for line in said.splitlines() if line.startswith(("sharded", "passes", "layers", "proven", "best"))
        ]
        if rates:
            result["tokens_per_second"] = [
                round(f(rates)) for f in (statistics.median, min, max)
            ]  # the range: evaluations and checkpoints are in it
        result["losses"] = [round(row["loss"], 5) for row in steps]
        result["validation_losses"] = [round(row["eval_loss"], 5) for row in rows if "eval_loss" in row]
        result["peak_gib"] = [facts["peak_gib"] and round(facts["peak_gib"], 2) for facts in measured]
        return result


def launch(
    command: list[str], processes: int, machines: int, environment: dict[str, str]
) -> list[subprocess.Popen[str]]:
    """Processes of one run under torchrun; several machines are launchers of their own that meet on this one."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    if processes == 1:
        return [subprocess.Popen([sys.executable, *command], env=environment, **pipes)]
    each = ["--nproc_per_node", str(processes // machines)]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if machines == 1:
        return [subprocess.Popen([*torchrun, "--standalone", *each, *command], env=environment, **pipes)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    return [
        subprocess.Popen(
            [*torchrun, *meeting, *each, *command], env={**environment, "CUDA_VISIBLE_DEVICES": str(machine)}, **pipes
        )
        for machine in range(machines)
    ]


def killed(bench: Bench) -> dict[str, Any]:
    """One of two processes is killed; how long the others live and what they say."""
    bench.copy("prepared", "killed")
    command = [__file__, _TIMED, str(bench.work / "killed.facts"), *bench.arguments("killed", bench.options.model)]
    (launcher,) = launch(command, 2, 1, dict(os.environ))
    log = bench.work / "killed" / "logs" / "training.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.2)
        if launcher.poll() is not None:
            return {"failed": launcher.communicate()[0][-2000:]}
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    began = time.monotonic()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = launcher.communicate()[0]
    lines = [line for line in said.splitlines() if line.startswith("train.py: ")]
    return {"seconds_to_end": round(time.monotonic() - began, 1), "status": launcher.returncode, "said": lines}


def answers(bench: Bench) -> dict[str, Any]:
    """The same answers from one process and from two."""
    hashes = {}
    for processes in (1, 2):
        name = f"answers{processes}"
        bench.copy("one", name)
        command = ["generate.py", *bench.arguments(name, bench.options.model)]
        (process,) = launch(command, processes, 1, dict(os.environ))
        said = process.communicate()[0]
        if process.returncode:
            return {"failed": said[:1500] + said[-1500:]}
        files = sorted((bench.work / name / "generations").glob("*.jsonl"))
        hashes[processes] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return {"files": len(hashes[1]), "same_bytes": hashes[1] == hashes[2]}


def resumed(bench: Bench, source: str, processes: int, sharded: bool) -> dict[str, Any]:
    """A run without its last checkpoint and adapter, resumed; its last losses are to be those of the source."""
    name = f"{source}_resumed_by_{processes}"
    bench.copy(source, name, "adapter")
    last = max((bench.work / name / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    return bench.train(name, processes=processes, sharded=sharded)


def larger_than_a_card(bench: Bench, limit: str) -> dict[str, Any]:
    large: Path = bench.options.large
    bench.prepare("large", large)
    named = ["--training.device_memory", limit, "--training.max_steps", "6", "--training.evaluations", "1"]
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true"}
    dry = ["train.py", *bench.arguments("large", large, *named), "--dry-run"]
    (process,) = launch(dry, 2, 1, environment)
    planned = [line for line in process.communicate()[0].splitlines() if "peak of all tensors" in line]
    return {"dry_run": planned, **bench.train("large", *named, processes=2, sharded=True, model=large)}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [_TIMED]:
        return timed_training(Path(argv[1]), argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--large", type=Path, help="a base for two cards")
    parser.add_argument("--dialogues", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "falcon-7b.yaml")
    parser.add_argument("--work", type=Path, default=Path("/tmp/two-cards"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", default="24GiB", help="training.device_memory of the large base")
    parser.add_argument("--only", nargs="*", help="measurements to make")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="settings for all trainings")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    bench.prepare("prepared", options.model)
    measurements: dict[str, Any] = {
        "one": lambda: bench.train("one"),
        "ddp": lambda: bench.train("ddp", processes=2),
        "ddp_twice_the_batch": lambda: bench.train("ddp2", "--training.batch_size", "64", processes=2),
        "sharded": lambda: bench.train("sharded", processes=2, sharded=True),
        "sharded_resumes": lambda: resumed(bench, "sharded", 2, True),
        "sharded_resumed_by_one": lambda: resumed(bench, "sharded", 1, False),
        "large": lambda: larger_than_a_card(bench, options.limit) if options.large else {"skipped": "no --large"},
        "two_machines": lambda: bench.train("machines", processes=2, machines=2),
        "killed": lambda: killed(bench),
        "answers": lambda: answers(bench),
    }
    from benchmarks.machine import device_name, facts_of_a_measurement

    record: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    record |= facts_of_a_measurement(shlex.join(["python", *sys.argv]), f"2 x {device_name()}")
    for name, measure in measurements.items():
        if options.only and name not in options.only:
            continue
        if name in ("one", "ddp", "ddp_twice_the_batch", "sharded", "two_machines"):
            folder = {"ddp_twice_the_batch": "ddp2", "two_machines": "machines"}.get(name, name)
            bench.copy("prepared", folder)
        began = time.monotonic()
        record[name] = measure()
        print(f"{name}: {time.monotonic() - began:.0f} s {json.dumps(record[name])[:600]}", flush=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
