"""Kills the four scripts at random moments, runs the same command again, and compares with a run left in peace.

    python tests/faults/campaign.py --trials 100
    python tests/faults/campaign.py --trials 100 --signals                  SIGINT and SIGTERM instead of SIGKILL
    python tests/faults/campaign.py --trials 100 --damage                   a damaged file instead
    python tests/faults/campaign.py --script train --trials 1 --seed 4711   one trial that failed, once more

A trial kills one script one to three times, each time at a random moment of its measured duration or just before a
random operation on the files of its run folder, and lets it finish in the end. With --damage a trial flips a bit in a
file, cuts it or zeroes a block of it, and starts the script that reads it. Trial k draws from seed + k. The exit status
is 1 if any trial failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
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

from kestrel.artifacts import git_commit, library_versions

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


def trial(small: SmallRun, stage: Stage, seed: int, signals: bool) -> list[Ended]:
    """Interrupts a script up to three times and lets it finish.

    Returns:
        How each of the runs ended.

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


def campaign(small: SmallRun, script: str, seeds: range, signals: bool) -> dict[str, Any]:
    """Runs the trials of one script. Returns what is told of them."""
    stage, failures = small.stages[script], []
    runs: list[Ended] = []
    for seed in seeds:
        try:
            runs += trial(small, stage, seed, signals)
        except Failure as failure:
            failures.append({"seed": seed, "what": str(failure)})
            print(f"{script}, seed {seed}: {failure}", flush=True)
    told: dict[str, Any] = {
        "trials": len(seeds),
        "survived": len(seeds) - len(failures),
        "interruptions_that_hit": sum(run.status != 0 for run in runs),
        "seconds_uninterrupted": round(stage.seconds, 2),
        "file_operations": stage.operations,
        "failures": failures,
    }
    if signals:
        told["seconds_to_stop_at_most"] = round(max(run.seconds_to_stop for run in runs if run.status), 2)
    return told


def damages(small: SmallRun, seeds: range) -> dict[str, Any]:
    """Runs the trials with damaged files. Returns what is told of them."""
    make_begun(small)
    reported, failures = 0, []
    for seed in seeds:
        try:
            reported += damaged(small, seed)[1].status != 0
        except Failure as failure:
            failures.append({"seed": seed, "what": str(failure)})
            print(f"seed {seed}: {failure}", flush=True)
    survived = len(seeds) - len(failures)
    return {
        "trials": len(seeds),
        "survived": survived,
        "refused_with_a_message": reported,
        "same_result": survived - reported,
        "failures": failures,
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="in all, spread over the scripts")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first trial of each script")
    parser.add_argument("--script", choices=(*SCRIPTS, "all"), default="all")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--signals", action="store_true", help="SIGINT and SIGTERM instead of SIGKILL")
    what.add_argument("--damage", action="store_true", help="damaged files instead")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where the result is written")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    scripts: tuple[str, ...] = SCRIPTS if chosen.script == "all" else (chosen.script,)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        work = Path(name)
        write_base(work / "base")
        write_corpus(work / "corpus", dialogues=32, candidates=True, test=80)
        # A stop by a signal is a line of the log of its own, so that lines between would be other means.
        training = ["--training.max_steps", "12", "--training.logging_steps", "1" if chosen.signals else "2"]
        small = SmallRun(Forks(work), work, training)
        told = {}
        if chosen.damage:
            told["damage"] = damages(small, range(chosen.seed, chosen.seed + chosen.trials))
            scripts = ()
        for index, script in enumerate(scripts):
            share = len(range(index, chosen.trials, len(scripts)))
            told[script] = campaign(small, script, range(chosen.seed, chosen.seed + share), chosen.signals)
    for what, counts in told.items():
        print(f"{what}: " + ", ".join(f"{key} {value}" for key, value in counts.items() if key != "failures"))
    result = {
        "command": shlex.join(["python", "tests/faults/campaign.py", *sys.argv[1:]]),
        "results": told,
        "seconds": round(time.monotonic() - began),
        "machine": {"cores": os.cpu_count()},
        "versions": library_versions(),
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = sum(len(counts["failures"]) for counts in told.values())
    print(f"{failed} of {chosen.trials} trials failed" if failed else f"{chosen.trials} trials survived")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
