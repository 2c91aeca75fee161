"""Damages one file of a small run and starts the script that reads it: it is reported, or it changes nothing."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from faults.forks import Ended, Moment
from faults.runs import Failure, SmallRun, Stage


@dataclass(frozen=True)
class Target:
    """Files that a script reads."""

    script: str
    state: str  # the folder of the small run that the run folder begins as
    files: tuple[str, ...]  # glob patterns in the run folder, or in the small run's if they begin with "../"
    is_input: bool = False  # the user's own files, for which other content may have another result


TARGETS = (
    Target("train", "after-preprocess", ("dataset/**/*",)),
    Target("generate", "after-train", ("dataset/**/*",)),
    Target("evaluate", "after-generate", ("dataset/**/*",)),
    Target("train", "begun-train", ("checkpoints/**/*",)),
    Target("train", "begun-train", ("logs/training.jsonl", "samples.jsonl", "config.yaml", ".lock")),
    Target("train", "after-train", ("checkpoints/**/*", "adapter/*")),
    Target("generate", "after-train", ("adapter/*",)),
    Target("generate", "begun-generate", ("generations/*", "generations/.*")),
    Target("generate", "after-generate", ("generations/*",)),
    Target("evaluate", "after-generate", ("adapter/*", "generations/*", "logs/training.jsonl")),
    Target("evaluate", "after-evaluate", ("evaluation/**/*",)),
    Target("generate", "after-train", ("../base/*",)),
    Target("preprocess", "start", ("../config.yaml", "../corpus/*", "../base/*"), is_input=True),
    Target("train", "after-preprocess", ("../config.yaml", "../base/*"), is_input=True),
)


def make_begun(small: SmallRun) -> None:
    """Keeps run folders of a training and a generation that were killed, as begun-train and begun-generate."""
    for name, pattern in (("train", "checkpoints/checkpoint-6/manifest.json"), ("generate", "generations/.*.partial")):
        stage = small.stages[name]
        for operation in range(stage.operations * 3 // 4, 0, -1):
            small.begin(stage, with_earlier=False)
            small.execute(stage, Moment(signal.SIGKILL, operation=operation))
            if any(path.stat().st_size > 100 for path in small.run.glob(pattern)):
                small.run.rename(small.work / f"begun-{name}")
                break
        else:
            raise SystemExit(f"no moment of {name} leaves {pattern}")


def damage(path: Path, draw: random.Random) -> str:
    """Flips a bit, cuts the end off or zeroes a block, as a lost page of a disk is. Returns what was done."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    how = draw.choice(("a flipped bit", "a flipped bit", "cut", "zeros"))
    if how == "a flipped bit":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[at:]
    else:
        end = min(at + 512, len(content))
        content[at:end] = bytes(end - at)
    path.write_bytes(content)
    return f"{how} at {at} of {path}"


def trial(small: SmallRun, seed: int) -> list[Ended]:
    """Damages a random file of a random target, and returns how the script that reads it ended.

    Raises:
        Failure: another result in silence, or a message that does not say where.
    """
    draw = random.Random(f"{seed} damage")
    target = draw.choice(TARGETS)
    stage = small.stages[target.script]
    shutil.rmtree(small.run, ignore_errors=True)
    shutil.copytree(small.work / target.state, small.run)
    chosen = [
        path
        for pattern in target.files
        for path in ((small.work if pattern.startswith("../") else small.run).glob(pattern.removeprefix("../")))
        if path.is_file() and path.stat().st_size
    ]
    path = draw.choice(sorted(chosen))
    original = path.read_bytes()
    done = damage(path, draw)
    try:
        ended = small.execute(stage)
        _judge(small, stage, target, path, ended)
    except Failure as failure:
        raise Failure(f"{target.script}.py after {done}: {failure}") from None
    finally:
        if small.run not in path.parents:
            path.write_bytes(original)
    return [ended]


def _judge(small: SmallRun, stage: Stage, target: Target, path: Path, ended: Ended) -> None:
    if ended.status not in (0, 1, 2) or ".py: unexpected " in ended.said:
        raise Failure(f"status {ended.status}:\n{ended.said}")
    if target.is_input:
        return
    if ended.status == 0:
        small.check_result(stage)
        return
    parents = [parent.name for parent in path.parents if small.work in parent.parents and parent != small.run]
    if not any(place in ended.said for place in [path.name, *parents]):
        raise Failure(f"a message that does not say where:\n{ended.said}")
