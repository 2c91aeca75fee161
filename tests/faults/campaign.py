"""Kills scripts at random moments, runs the same command again, and compares with a run left in peace.

    python tests/faults/campaign.py --trials 100
    python tests/faults/campaign.py --trials 100 --faults signal            SIGINT and SIGTERM instead of SIGKILL
    python tests/faults/campaign.py --trials 100 --faults damage            a damaged file instead
    python tests/faults/campaign.py --trials 100 --faults disk              a disk that fails; needs a C compiler
    python tests/faults/campaign.py --stages train --trials 1 --seed 4711   one trial that failed, once more

A trial kills one script one to three times, each time at a random moment of its measured duration or just before a
random operation on the files of its run folder, and lets it finish in the end. With `damage` a trial flips a bit in a
file, cuts it or zeroes a block of it, and starts the script that reads it. Trial k draws from seed + k. The exit status
is 1 if any trial failed.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# A fork has no threads but its own, and what another thread holds at that moment is held for ever: none are started.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ |= {"JE_ARROW_MALLOC_CONF": "background_thread:false", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "MPLBACKEND": "agg"}
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from faults.damage import make_begun
from faults.damage import trial as damaged
from faults.forks import Ended, Forks, Moment
from faults.runs import PLANS, THE_CHAIN, Failure, SmallRun, Stage
from make_models import write_base, write_corpus

from benchmarks.machine import device_name
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import git_commit, library_versions

FAULTS = ("kill", "signal", "damage", "disk")
_STOPPED = {signal.SIGINT: (130, -signal.SIGINT), signal.SIGTERM: (143, -signal.SIGTERM)}


def draw_kill(draw: random.Random, stage: Stage) -> Moment:
    """A moment from before the first operation to just after the end."""
    if draw.random() < 0.5:
        return Moment(seconds=draw.uniform(0, 1.05 * stage.seconds))
    return Moment(operation=draw.randint(1, stage.operations))


def draw_signal(draw: random.Random, stage: Stage) -> Moment:
    """A moment of SIGINT or SIGTERM, in a third of the cases followed by a second one.

    A conversation gets no SIGINT: its first one stops an answer, as it should, and what is said after it is another.
    """
    number = signal.SIGTERM if stage.plan.script == "chat" else draw.choice((signal.SIGINT, signal.SIGTERM))
    again = draw.uniform(0, 0.3) if draw.random() < 1 / 3 else None
    return Moment(number, seconds=draw.uniform(0, 1.05 * stage.seconds), again=again)


def disk_trial(small: SmallRun, stage: Stage, seed: int) -> list[Ended]:
    """Lets a write, a rename or another change of the run folder fail, for a moment or for good, and runs it again.

    Raises:
        Failure: no message, half a result, or another result in the end.
    """
    draw = random.Random(f"{seed} {stage.name} disk")
    small.begin(stage, with_earlier=draw.random() < 0.5)
    error = draw.choice((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
    moment = Moment(change=draw.randint(1, stage.changes), error=error, stays=draw.random() < 0.7)
    broken = small.execute(stage, moment)
    if broken.status not in (0, 1) or ".py: unexpected " in broken.said:
        raise Failure(f"exit status {broken.status} after {moment}:\n{broken.said}")
    small.check_whole(stage)
    ended = small.execute(stage)
    if ended.status:
        raise Failure(f"the same command fails with {ended.status} after {moment}:\n{ended.said}")
    small.check_result(stage)
    return [broken, ended]


def under_a_failing_disk(folder: Path) -> int:
    """Runs this program again with disk.c between it and the disk; returns its exit status."""
    library, source = folder / "disk.so", Path(__file__).with_name("disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    preloaded = {**os.environ, "LD_PRELOAD": str(library)}
    return subprocess.run([sys.executable, *sys.argv], env=preloaded, check=False).returncode


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


def count(result: dict[str, Any], kind: str, seed: int, attempt: Callable[[int], list[Ended]]) -> None:
    """Makes one trial and adds it to the result of its kind."""
    result["trials"] += 1
    try:
        runs = attempt(seed)
    except Failure as failure:
        result["failures"].append({"seed": seed, "what": str(failure)})
        print(f"{kind}, seed {seed}: {failure}", flush=True)
        return
    result["survived"] += 1
    result[hits_of(kind)] += sum(run.status != 0 for run in runs)
    if kind.startswith("signal"):
        slowest = max((run.seconds_to_stop for run in runs if run.status), default=0.0)
        result["seconds_to_stop_at_most"] = max(result["seconds_to_stop_at_most"], round(slowest, 2))


def hits_of(kind: str) -> str:
    """What a trial of this kind that had an effect is called."""
    return "refused_with_a_message" if kind == "damage" else "interruptions_that_hit"  # damage may change nothing


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="in all, spread over faults and stages")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first trial of each kind")
    parser.add_argument("--stages", nargs="+", choices=list(PLANS), default=list(PLANS), help="default: all")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=["kill"], help="default: kill")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where the result is written")
    return parser.parse_args()


def attempts_of(chosen: argparse.Namespace, small: SmallRun) -> dict[str, Callable[[int], list[Ended]]]:
    """A trial for each kind of fault and each stage, by name; each takes a seed."""
    attempts = {
        f"{fault} {stage}": partial(disk_trial, small, small.stages[stage])
        if fault == "disk"
        else partial(trial, small, small.stages[stage], fault == "signal")
        for fault in chosen.faults
        for stage in (chosen.stages if fault != "damage" else ())
    }
    return attempts | ({"damage": partial(damaged, small)} if "damage" in chosen.faults else {})


def main() -> int:
    chosen = command_line()
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        if "disk" in chosen.faults and "LD_PRELOAD" not in os.environ:
            return under_a_failing_disk(work)
        write_base(work / "base")
        write_corpus(work / "corpus", dialogues=32, candidates=True, test=80)
        # A stop by a signal logs a line, which would change the means of the lines that follow.
        every = "1" if "signal" in chosen.faults else "2"
        options = ["--training.max_steps", "12", "--training.logging_steps", every]
        names = (*chosen.stages, *(THE_CHAIN if "damage" in chosen.faults else ()))
        small = SmallRun(Forks(work), work, options, names)
        if "damage" in chosen.faults:
            make_begun(small)
        attempts = attempts_of(chosen, small)
        for kind in attempts:
            stage = small.stages.get(kind.partition(" ")[2])
            results[kind] = {"trials": 0, "survived": 0, hits_of(kind): 0, **(stage.measured() if stage else {})}
            results[kind] |= {"seconds_to_stop_at_most": 0.0} if kind.startswith("signal") else {}
            results[kind]["failures"] = []
        for number in range(chosen.trials):
            kind, seed = list(attempts)[number % len(attempts)], chosen.seed + number // len(attempts)
            count(results[kind], kind, seed, attempts[kind])
            if chosen.output and (number % 10 == 9 or number == chosen.trials - 1):  # a long campaign may be stopped
                write_report(chosen.output, results, time.monotonic() - began)
    for kind, result in results.items():
        print(
            f"{kind}: {result['survived']} of {result['trials']} trials survived, {result[hits_of(kind)]} hits",
            flush=True,
        )
    return 1 if any(result["failures"] for result in results.values()) else 0


def write_report(path: Path, results: dict[str, dict[str, Any]], seconds: float) -> None:
    report = {
        "command": shlex.join(["python", "tests/faults/campaign.py", *sys.argv[1:]]),
        "results": results,
        "seconds": round(seconds),
        "machine": {"processor": device_name(), "cores": os.cpu_count()},
        "versions": library_versions(),
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(path, report)


if __name__ == "__main__":
    sys.exit(main())
