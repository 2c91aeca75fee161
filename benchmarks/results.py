"""What fine-tuning does to a real model: Kestrel beside other recipes, on the same dialogues, several seeds each.

    python benchmarks/results.py --text DIALOGUES --model FOLDER --jobs 8 --minutes 60

Every experiment is a run of preprocess.py, train.py (or of another recipe, benchmarks/recipes.py) and generate.py on
dialogues that are cut by persona once. The record gets a line per experiment: the settings, seconds, peak memory, and per
test dialogue the sums that decide each score, from which docs/fill_results.py makes tables, intervals and tests. What the
record holds already is not run again. The first seed of every arm is run first.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.experiments import append, read_record, scores_of, trivial, validation_of
from benchmarks.held_out import cut
from benchmarks.options import at_least_one, told

RECORD = ROOT / "benchmarks" / "results" / "smollm2.jsonl"
PLAIN, CHAT = "configs/smollm2-135m.yaml", "configs/smollm2-135m-instruct.yaml"
LEARNING_RATE, EPOCHS = 5e-4, 3
_MARK = "measured: "


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        what: for the table.
        recipe: of benchmarks/recipes.py; None: train.py; "base": nothing is trained.
        config: of the scripts.
        options: of the scripts, beside those that all arms share.
    """

    what: str
    recipe: str | None = None
    config: str = CHAT
    options: dict[str, str] = field(default_factory=dict)


_16 = {"quantization.bits": "16"}
_ORIGINAL = {"prompt.format": "original", "generation.stop_strings": "\n"}


def _only(key: str, value: object) -> dict[str, str]:
    return {key: str(value)}


ARMS = {
    "kestrel-chat": Arm("Kestrel, chat template"),
    "original": Arm("the original project's recipe", "original", options=_ORIGINAL),
    "kestrel-plain": Arm("Kestrel, plain prompt", config=PLAIN),
    "trl-turns": Arm("TRL, one example per reply", "trl-turns"),
    "trl-dialogues": Arm("TRL, whole dialogues, loss on replies", "trl-dialogues"),
    "base-chat": Arm("base, chat template", "base"),
    "base-plain": Arm("base, plain prompt", "base", PLAIN),
    "attention": Arm("LoRA on attention only", options=_only("lora.target_modules", "q_proj k_proj v_proj o_proj")),
    "kestrel-chat-16bit": Arm("Kestrel, chat template, 16 bit", options=_16),
    "kestrel-plain-16bit": Arm("Kestrel, plain prompt, 16 bit", config=PLAIN, options=_16),
    "r-4": Arm("rank 4", options=_only("lora.r", 4) | _only("lora.alpha", 8)),
    "r-64": Arm("rank 64", options=_only("lora.r", 64) | _only("lora.alpha", 128)),
    "lr-1e-4": Arm("learning rate 1e-4", options=_only("training.learning_rate", 1e-4)),
    "lr-2e-4": Arm("learning rate 2e-4", options=_only("training.learning_rate", 2e-4)),
    "lr-1e-3": Arm("learning rate 1e-3", options=_only("training.learning_rate", 1e-3)),
    "lr-2e-3": Arm("learning rate 2e-3", options=_only("training.learning_rate", 2e-3)),
    "trl-defaults": Arm("TRL, one example per reply, its own learning rate and batch", "trl-defaults"),
    "base-chat-16bit": Arm("base, chat template, 16 bit", "base", options=_16),
    "base-plain-16bit": Arm("base, plain prompt, 16 bit", "base", PLAIN, _16),
}


@dataclass
class Runner:
    """Runs experiments side by side.

    Attributes:
        work: folder of runs.
        model: folder of the base.
        record: the file of results.
        shared: options of every script.
        max_steps: of training; None: all epochs.
        deadline: of `time.monotonic`.
        devices: values of CUDA_VISIBLE_DEVICES, one per experiment that may run at once; None: as it is.
        facts: what every line of the record says too.
    """

    work: Path
    model: Path
    record: Path
    shared: dict[str, str]
    max_steps: int | None
    deadline: float
    devices: queue.SimpleQueue[str | None]
    facts: dict[str, Any]
    longest: float = 0.0

    def run(self, name: str, seed: int) -> str:
        """Runs one experiment and adds its line to the record; returns a line for the terminal."""
        device = self.devices.get()
        try:
            began = time.monotonic()
            if began + self.longest > self.deadline:
                return f"{name}, seed {seed}: not started, there is no time left"
            entry = self._experiment(name, seed, device)
            self.longest = max(self.longest, time.monotonic() - began)
        except subprocess.TimeoutExpired:
            return f"{name}, seed {seed}: stopped, the time is over"
        except subprocess.CalledProcessError as error:
            return f"{name}, seed {seed}: FAILED\n{error.stdout[-1500:]}\n{error.stderr[-3000:]}"
        finally:
            self.devices.put(device)
        append(self.record, [entry])
        seconds = entry["training"].get("seconds", 0)
        return f"{name}, seed {seed}: trained in {seconds:.0f} s, all in {time.monotonic() - began:.0f} s"

    def _experiment(self, name: str, seed: int, device: str | None) -> dict[str, Any]:
        arm, run = ARMS[name], self.work / f"{name}-{seed}"
        options = arguments_of(arm, seed, run, self.shared)
        if self.max_steps:
            options["training.max_steps"] = str(self.max_steps)
            del options["training.epochs"]
        options["data.source"] = str(self.work / ("turns" if arm.recipe == "original" else "dialogues"))
        training: dict[str, Any] = {}
        self._script("preprocess", arm.config, options, device)
        if arm.recipe is None:
            training = self._script("train", arm.config, options, device)
        elif arm.recipe != "base":
            given = {"seed": seed, "epochs": EPOCHS, "learning_rate": LEARNING_RATE, "max_steps": self.max_steps}
            words = [arm.recipe, "--run", str(run), "--model", str(self.model), "--options", json.dumps(given)]
            training = self._python("recipes.py", words, device)
            options["model.adapter"] = str(run / "recipe")
        answering = self._script("generate", arm.config, options, device)
        system = "base" if arm.recipe == "base" else "adapter"
        told_options = {"config": arm.config, "recipe": arm.recipe, **arm.options}
        return {
            "arm": name, "seed": seed, "options": told_options, "max_steps": self.max_steps, "training": training,
            "answering": answering, "validation": validation_of(run), **scores_of(run, system), **self.facts,
        }  # fmt: skip

    def _script(self, script: str, config: str, options: dict[str, str], device: str | None) -> dict[str, Any]:
        given = [word for key, value in options.items() for word in (f"--{key}", *words_of(key, value))]
        return self._python("chain.py", ["--here", script, "--", "--config", str(ROOT / config), *given], device)

    def _python(self, program: str, words: list[str], device: str | None) -> dict[str, Any]:
        """What a benchmark's process says that it took."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, str(ROOT / "benchmarks" / program), *words]
        left = max(1.0, self.deadline - time.monotonic())
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=left
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith(_MARK))
        return dict(json.loads(line.removeprefix(_MARK)))


def words_of(key: str, value: str) -> list[str]:
    """A value as words of a command line: a list of layers is several."""
    return value.split() if key == "lora.target_modules" else [value]


def arguments_of(arm: Arm, seed: int, run: Path, shared: dict[str, str]) -> dict[str, str]:
    """Options of the scripts for one experiment."""
    return {
        "run_dir": str(run),
        "seed": str(seed),
        "data.max_dialogues": "1000000",
        "training.epochs": str(EPOCHS),
        "training.batch_size": "16",
        "training.learning_rate": str(LEARNING_RATE),
        "training.tokens_per_step": "8192",
        "training.recompute": "none",
        "training.evaluations": "3",
        "training.samples": "0",
        "generation.systems": "base" if arm.recipe == "base" else "adapter",
        "generation.max_dialogues": "1000000",
        "generation.candidates": "true",
        "generation.other_personas": "1",
        **shared,
        **arm.options,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="dialogues in any form that preprocess.py reads")
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="folder of the runs (runs/results)")
    parser.add_argument("--output", type=Path, default=RECORD, help="the record, which is added to")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=at_least_one, default=1, help="experiments side by side, over all GPUs")
    parser.add_argument("--minutes", type=float, default=10_000, help="start nothing that will not end within them")
    parser.add_argument("--dialogues", type=at_least_one, help="only so many dialogues, for a trial")
    parser.add_argument("--max-steps", type=at_least_one, help="only so many steps of training, for a trial")
    options = parser.parse_args(argv)
    return told(lambda: measure(options))


def measure(options: argparse.Namespace) -> int:
    """Runs what the record lacks.

    Returns:
        1 where an experiment failed, else 0.
    """
    import torch

    from benchmarks import machine
    from kestrel.runtime.manifest import git_commit, library_versions

    deadline = time.monotonic() + options.minutes * 60
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines, gpus = read_record(options.output), torch.cuda.device_count()
    data = cut(options.text, options.work, PLAIN, options.model, options.dialogues)
    if not lines:
        append(options.output, [{"arm": "data", "seed": 0, **data}])
    facts = {
        "device": machine.device_name(), "jobs": options.jobs, "gpus": gpus, "versions": library_versions(),
        "commit": git_commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    shared = {"model.name": str(options.model), "quantization.compute_dtype": machine.compute_dtype()}
    shared |= {"generation.tokens_per_step": "65536"} if gpus else {}
    devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for job in range(options.jobs):
        devices.put(str(job % gpus) if gpus else None)
    runner = Runner(options.work, options.model, options.output, shared, options.max_steps, deadline, devices, facts)
    done = {(line["arm"], line["seed"]) for line in lines}
    wanted = [
        (name, seed)
        for seed in options.seeds
        for name in options.arms
        if (name, seed) not in done and (seed == options.seeds[0] or ARMS[name].recipe != "base")
    ]
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(runner.run, *pair) for pair in wanted]):
            print(future.result(), flush=True)
            failed |= "FAILED" in future.result()
    if not any(line["arm"] == "constant_reply" for line in lines):
        append(options.output, trivial(options.work))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
