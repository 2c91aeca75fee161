"""Kills the four scripts at random moments, runs the same command again, and compares with a run left in peace.

    python tests/faults/campaign.py --trials 100
    python tests/faults/campaign.py --trials 100 --faults signal            SIGINT and SIGTERM instead of SIGKILL
    python tests/faults/campaign.py --trials 100 --faults damage            a damaged file instead
    python tests/faults/campaign.py --script train --trials 1 --seed 4711   one trial that failed, once more

A trial kills one script one to three times, each time at a random moment of its measured duration or just before a
random operation on the files of its run folder, and lets it finish in the end. With `damage` a trial flips a bit in a
file, cuts it or zeroes a block of it, and starts the script that reads it. Trial k draws from seed + k. The exit status
is 1 if any trial failed.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # a fork has no threads but its own
    os.environ[_name] = "1"
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "MPLBACKEND": "agg"}
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from faults.damage import make_begun
from faults.damage import trial as damaged
from faults.forks import SCRIPTS, Ended, Forks, Moment
from faults.runs import Failure, SmallRun, Stage
from make_models import write_base, write_corpus

from benchmarks.machine import device_name
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import git_commit, library_versions

_HITS = {"damage": "refused_with_a_message"}  # or else the result was the same
FAULTS = ("kill", "signal", "damage")
_STOPPED = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143, -signal.SIGTERM)}


def draw_kill(draw: random.Random, stage: Stage) -> Moment:
    """A moment from before the first operation to just after the end."""
    if draw.random() < 0.5:
        return Moment(seconds=draw.uniform(0, 1.05 * stage.seconds))
    return Moment(operation=draw.randint(1, stage.operations))


def draw_signal(draw: random.Random, stage: Stage) -> Moment:
    """A moment of SIGINT or SIGTERM, in a third of the cases followed by a second one."""
    number = draw.choice((signal.SIGINT, signal.SIGTERM))
    again = draw.uniform(0, 0.3) if draw.random() < 1 / 3 else None
    return Moment(number, seconds=draw.uniform(0, 1.05 * stage.seconds), again=again)


def trial(small: SmallRun, stage: Stage, signals: bool, seed: int) -> list[Ended]:
    """Interrupts a script up to three times, lets it finish, and returns how each of the runs ended.

    Raises:
        Failure: a result that differs, half a result, a traceback, a status that is not the signal's.
    """
    draw = random.Random(f"{seed} {stage.name} {signals}")
    small.begin(stage, with_earlier=draw.random() < 0.5)
    runs = []
    for _ in range(draw.randint(1, 3)):
        moment = (draw_signal if signals else draw_kill)(draw, stage)
        ended = small.execute(stage, moment)
        runs.append(ended)
        if ended.status not in (0, *_STOPPED.get(signal.Signals(moment.number), (-signal.SIGKILL,))):
            raise Failure(f"exit status {ended.status} after {moment}:\n{ended.said}")
        small.check_whole(stage)
    ended = small.execute(stage)
    if ended.status:
        raise Failure(f"the same command fails with {ended.status}:\n{ended.said}")
    runs.append(ended)
    small.check_result(stage)
    return runs


@dataclass
class Tally:
    """The results of one kind of trial."""

    measured: dict[str, Any] = field(default_factory=dict)  # of the undisturbed script
    trials: int = 0
    hits: int = 0
    stopped_in: float = 0.0  # greatest number of seconds from the first signal to the end of the process
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, seed: int, attempt: Callable[[], list[Ended]]) -> None:
        """Makes one trial and counts it."""
        self.trials += 1
        try:
            runs = attempt()
        except Failure as failure:
            self.failures.append({"seed": seed, "what": str(failure)})
            print(f"{name}, seed {seed}: {failure}", flush=True)
            return
        self.hits += sum(run.status != 0 for run in runs)
        self.stopped_in = max([self.stopped_in, *(run.seconds_to_stop for run in runs if run.status)])

    def as_json(self, hits: str, signals: bool) -> dict[str, Any]:
        survived = self.trials - len(self.failures)
        stopped = {"seconds_to_stop_at_most": round(self.stopped_in, 2)} if signals else {}
        counts = {"trials": self.trials, "survived": survived, hits: self.hits}
        return counts | self.measured | stopped | {"failures": self.failures}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="in all, spread over faults and scripts")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first trial of each kind")
    parser.add_argument("--script", choices=(*SCRIPTS, "all"), default="all")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=["kill"], help="default: kill")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where the result is written")
    return parser.parse_args()


def attempts_of(chosen: argparse.Namespace, small: SmallRun) -> dict[str, Callable[[int], list[Ended]]]:
    """A trial for each kind of fault and each script, by name; each takes a seed."""
    scripts = SCRIPTS if chosen.script == "all" else (chosen.script,)
    attempts: dict[str, Callable[[int], list[Ended]]] = {}
    for fault in chosen.faults:
        for script in scripts if fault != "damage" else ():
            attempts[f"{fault} {script}"] = partial(trial, small, small.stages[script], fault == "signal")
        if fault == "damage":
            attempts["damage"] = partial(damaged, small)
    return attempts


def main() -> int:
    chosen = options()
    began = time.monotonic()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        write_base(work / "base")
        write_corpus(work / "corpus", dialogues=32, candidates=True, test=80)
        # A stop by a signal logs a line, which would change the means of the lines that follow.
        every = "1" if "signal" in chosen.faults else "2"
        training = ["--training.max_steps", "12", "--training.logging_steps", every]
        small = SmallRun(Forks(work), work, training)
        if "damage" in chosen.faults:
            make_begun(small)
        attempts = attempts_of(chosen, small)
        for kind in attempts:
            stage = small.stages.get(kind.partition(" ")[2])
            tallies[kind] = Tally(stage.measured() if stage else {})
        for number in range(chosen.trials):
            kind, seed = list(attempts)[number % len(attempts)], chosen.seed + number // len(attempts)
            tallies[kind].add(kind, seed, partial(attempts[kind], seed))
            if chosen.output and (number % 10 == 9 or number == chosen.trials - 1):
                write_report(chosen, tallies, time.monotonic() - began)
    for kind, tally in tallies.items():
        survived = tally.trials - len(tally.failures)
        print(f"{kind}: {survived} of {tally.trials} trials survived, {tally.hits} hits", flush=True)
    return 1 if any(tally.failures for tally in tallies.values()) else 0


def write_report(chosen: argparse.Namespace, tallies: dict[str, Tally], seconds: float) -> None:
    """Writes what is known so far, whole, so that a long campaign may be stopped."""
    report = {
        "command": shlex.join(["python", "tests/faults/campaign.py", *sys.argv[1:]]),
        "results": {
            kind: tally.as_json(_HITS.get(kind, "interruptions_that_hit"), kind.startswith("signal"))
            for kind, tally in tallies.items()
        },
        "seconds": round(seconds),
        "machine": {"processor": device_name(), "cores": os.cpu_count()},
        "versions": library_versions(),
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(chosen.output, report)


if __name__ == "__main__":
    sys.exit(main())
