"""A small run: what each script starts from, and what it must leave behind however often it was interrupted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from faults.forks import SCRIPTS, Ended, Forks, Moment
from make_models import write_config

# Answers are drawn at random and in several shards.
_EXTRA = """  tokens_per_step: 400
  do_sample: true
  temperature: 0.8
  candidates: true
evaluation:
  resamples: 100
  samples: 5
"""
# What a script leaves behind, and options with which it would leave something else.
_RESULTS = {
    "preprocess": ["dataset"],
    "train": ["adapter", "logs/training.jsonl", "samples.jsonl"],
    "generate": ["generations"],
    "evaluate": ["evaluation"],
    "publish": ["merged"],
}
_OTHERWISE = {
    "preprocess": ["--seed", "1"],
    "train": ["--training.learning_rate", "2e-2"],
    "generate": ["--generation.temperature", "0.9"],
    "evaluate": ["--evaluation.resamples", "101"],
    "publish": ["--generation.max_new_tokens", "9"],
}
_GROWING = ("logs/", "samples.jsonl", "generations/manifest.json")


class Failure(Exception):
    """A promise that was not kept."""


@dataclass
class Stage:
    """One script of the small run."""

    name: str
    arguments: list[str]
    start: Path  # the run folder as the script before left it
    done: Path  # the run folder after a run that nothing interrupted
    expected: dict[str, bytes] = field(default_factory=dict)  # the results in it, by relative path
    earlier: dict[str, bytes] = field(default_factory=dict)  # the same, made with other options
    seconds: float = 0.0
    operations: int = 0
    changes: int = 0

    def measured(self) -> dict[str, float]:
        """What the undisturbed run took."""
        return {"seconds_undisturbed": round(self.seconds, 2), "file_operations": self.operations}


class SmallRun:
    """The four scripts on a tiny model, each run once without an interruption.

    The folder `work` holds base/ and corpus/ and nothing else; `options` are added to every command line.
    """

    def __init__(self, forks: Forks, work: Path, options: list[str]):
        self._forks, self.work, self.run = forks, work, work / "run"
        config = write_config(work / "config.yaml", work / "base", work / "corpus", self.run, _EXTRA)
        self.stages: dict[str, Stage] = {}
        start = work / "start"
        start.mkdir()
        for name in SCRIPTS:
            own = ["--merge", str(self.run / "merged")] if name == "publish" else []
            stage = Stage(name, ["--config", str(config), *options, *own], start, work / f"after-{name}")
            for expected, more in ((stage.earlier, _OTHERWISE[name]), (stage.expected, [])):
                self.begin(stage, with_earlier=False)
                ended = self.execute(stage, more=more)
                if ended.status:
                    raise SystemExit(f"{name} fails without a fault:\n{ended.said}")
                expected |= self.results(name)
            # The second run of each script pays for no import that the first one caused.
            stage.seconds, stage.operations, stage.changes = ended.seconds, ended.operations or 0, ended.changes or 0
            self.run.rename(stage.done)
            self.stages[name], start = stage, stage.done

    def begin(self, stage: Stage, with_earlier: bool) -> None:
        """Puts the run folder where the script begins, perhaps with results of other options in its way."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(stage.start, self.run)
        for name, content in stage.earlier.items() if with_earlier else ():
            (self.run / name).parent.mkdir(parents=True, exist_ok=True)
            (self.run / name).write_bytes(content)

    def execute(self, stage: Stage, moment: Moment | None = None, more: list[str] | None = None) -> Ended:
        """Runs the script in the run folder."""
        try:
            ended = self._forks.run(stage.name, [*stage.arguments, *(more or [])], self.run, moment)
        except TimeoutError as error:
            raise Failure(str(error)) from None
        if "Traceback" in ended.said:
            raise Failure(f"a traceback:\n{ended.said}")
        return ended

    def results(self, name: str) -> dict[str, bytes]:
        """What a script has left in the run folder under its final name, by relative path."""
        found = {}
        for result in _RESULTS[name]:
            top = self.run / result
            for path in [top, *sorted(top.rglob("*"))]:
                if path.is_file() and not path.name.startswith("."):
                    found[path.relative_to(self.run).as_posix()] = path.read_bytes()
        return found

    def check_whole(self, stage: Stage) -> None:
        """Raises Failure unless each result is whole: all of this run's or all of the earlier one's."""
        found = {name: content for name, content in self.results(stage.name).items() if not name.startswith(_GROWING)}
        for top in {name.split("/")[0] for name in found if not name.startswith("generations/")}:
            these = {name: content for name, content in found.items() if name.startswith(f"{top}/")}
            wholes = [
                {name: content for name, content in whole.items() if name.startswith(f"{top}/")}
                for whole in (stage.expected, stage.earlier)
            ]
            if these not in wholes:
                raise Failure(f"{top} is neither what was there before nor what was being made")
        for name, content in found.items():
            if content not in (stage.expected.get(name), stage.earlier.get(name)):
                raise Failure(f"{name} is neither what was there before nor what was being made")

    def check_result(self, stage: Stage) -> None:
        """Raises Failure unless the results are those of the uninterrupted run, byte for byte."""
        found, expected = self.results(stage.name), stage.expected
        different = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        if different:
            raise Failure(f"not what the uninterrupted run made: {', '.join(different)}")
        hidden = [path for path in self.run.rglob(".*") if path.name != ".lock"]
        if hidden:
            raise Failure(f"left lying about: {hidden[0].relative_to(self.run)}")
