"""A small run: what each script starts from, and what it must leave behind however often it was interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from faults.forks import Ended, Forks, Moment
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
# Of a messenger: thirty days of two people.
_TALK = (("Ben", "what do you do"), ("Ana", "i bake bread"), ("Ben", "for whom"), ("Ana", "for the whole street"))
_EXPORT = "".join(
    f"{day:02}/01/2024, 10:{minute:02} - {name}: {text} on day {day}\n"
    for day in range(1, 31)
    for minute, (name, text) in enumerate(_TALK)
)
_SAID = "what do you do ?\n/tokens\ndo you like dogs ?\n/undo\ndo you like cats ?\n/save {run}/conversations.jsonl\n"
_TRAINED = ("adapter", "logs/training.jsonl", "samples.jsonl")
_GROWING = ("logs/", "samples.jsonl", "generations/manifest.json")


class Failure(Exception):
    """A promise that was not kept."""


@dataclass(frozen=True)
class Plan:
    """A stage: which script, in the run folder of which stage, with which options ({work} and {run} are folders)."""

    script: str
    follows: str | None
    results: tuple[str, ...]  # what it leaves behind
    options: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()  # options with which it would leave something else; none: no such result in its way
    needs: str | None = None  # another stage, whose folder its options name


PLANS = {
    "preprocess": Plan("preprocess", None, ("dataset",), otherwise=("--seed", "1")),
    "train": Plan("train", "preprocess", _TRAINED, otherwise=("--training.learning_rate", "2e-2")),
    "generate": Plan("generate", "train", ("generations",), otherwise=("--generation.temperature", "0.9")),
    "evaluate": Plan("evaluate", "generate", ("evaluation",), otherwise=("--evaluation.resamples", "101")),
    "publish": Plan(
        "publish", "evaluate", ("merged",), ("--merge", "{run}/merged"), ("--generation.max_new_tokens", "9")
    ),
    "chat export": Plan(
        "preprocess",
        None,
        ("dataset",),
        (
            *("--data.source", "{work}/export.txt", "--data.self", "Ana", "--data.session_gap", "3"),
            *("--data.persona", "i am a baker."),
        ),
        ("--seed", "1"),
    ),
    "train longer": Plan("train", "train", _TRAINED, ("--training.max_steps", "18")),
    "train from an adapter": Plan(
        "train", "preprocess", _TRAINED, ("--training.init_adapter", "{work}/after-train/adapter"), needs="train"
    ),
    "sheet": Plan("evaluate", "generate", ("evaluation", "sheet"), ("--evaluation.sheet", "4")),
    "judgements": Plan("evaluate", "sheet", ("evaluation",), ("--evaluation.judgements", "{work}/judged.json")),
    "chat": Plan("chat", "train", ("conversations.jsonl",), ("--load", "{work}/begun.jsonl")),
}
THE_CHAIN = ("preprocess", "train", "generate", "evaluate", "publish")


@dataclass
class Stage:
    """One script of the small run."""

    name: str
    plan: Plan
    arguments: list[str]
    start: Path  # the run folder as the script before left it
    done: Path  # the run folder after a run that nothing interrupted
    before: dict[str, bytes] = field(default_factory=dict)  # what stands in the start folder under the results' names
    expected: dict[str, bytes] = field(default_factory=dict)  # the results of that run, by relative path
    earlier: dict[str, bytes] = field(default_factory=dict)  # the same, made with other options
    seconds: float = 0.0
    operations: int = 0
    changes: int = 0

    def measured(self) -> dict[str, float]:
        """What the undisturbed run took."""
        return {"seconds_undisturbed": round(self.seconds, 2), "file_operations": self.operations}


class SmallRun:
    """Stages on a tiny model, each run once without an interruption.

    The folder `work` holds base/ and corpus/ and nothing else; `options` are added to every command line.
    """

    def __init__(self, forks: Forks, work: Path, options: list[str], names: tuple[str, ...]):
        self._forks, self.work, self.run, self._options = forks, work, work / "run", options
        self._config = write_config(work / "config.yaml", work / "base", work / "corpus", self.run, _EXTRA)
        (work / "start").mkdir()
        (work / "export.txt").write_text(_EXPORT, encoding="utf-8")
        forks.typed.write_text(_SAID.format(run=self.run), encoding="utf-8")
        row = {"dialogue_id": "begun", "persona": ["i am a baker."], "turns": []}
        said = [{"speaker": "partner", "text": "hello"}, {"speaker": "self", "text": "good morning"}]
        (work / "begun.jsonl").write_text(json.dumps(row | {"turns": said}) + "\n", encoding="utf-8")
        self.stages: dict[str, Stage] = {}
        for name in names:
            self._make(name)

    def _make(self, name: str) -> Stage:
        """Makes a stage, and those that it needs."""
        if name in self.stages:
            return self.stages[name]
        plan = PLANS[name]
        start = self._make(plan.follows).done if plan.follows else self.work / "start"
        if plan.needs:
            self._make(plan.needs)
        if name == "judgements":
            self._judge(start / "sheet" / "key.json")
        own = [option.format(work=self.work, run=self.run) for option in plan.options]
        arguments = ["--config", str(self._config), *self._options, *own]
        stage = Stage(name, plan, arguments, start, self.work / f"after-{name.replace(' ', '-')}")
        self.begin(stage, with_earlier=False)
        stage.before = self.results(stage)
        for results, more in ((stage.earlier, plan.otherwise), (stage.expected, ())):
            if results is stage.earlier and not more:
                continue
            self.begin(stage, with_earlier=False)
            ended = self.execute(stage, more=list(more))
            if ended.status:
                raise SystemExit(f"{name} fails without a fault:\n{ended.said}")
            results |= self.results(stage)
        if stage.before == stage.expected:
            raise SystemExit(f"{name} leaves what was there before:\n{ended.said}")
        # The second run of each script pays for no import that the first one caused.
        stage.seconds, stage.operations, stage.changes = ended.seconds, ended.operations or 0, ended.changes or 0
        self.run.rename(stage.done)
        self.stages[name] = stage
        return stage

    def _judge(self, key: Path) -> None:
        """Fills in a sheet: always left."""
        sheet = json.loads(key.read_text(encoding="utf-8"))
        judged = {"sheet": sheet["sheet"], "judge": "one", "choices": dict.fromkeys(sheet["items"], "left")}
        (self.work / "judged.json").write_text(json.dumps(judged), encoding="utf-8")

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
            ended = self._forks.run(stage.plan.script, [*stage.arguments, *(more or [])], self.run, moment)
        except TimeoutError as error:
            raise Failure(str(error)) from None
        if "Traceback" in ended.said:
            raise Failure(f"a traceback:\n{ended.said}")
        return ended

    def results(self, stage: Stage) -> dict[str, bytes]:
        """What a script has left in the run folder under its final name, by relative path."""
        found = {}
        for result in stage.plan.results:
            top = self.run / result
            for path in [top, *sorted(top.rglob("*"))]:
                if path.is_file() and not path.name.startswith("."):
                    found[path.relative_to(self.run).as_posix()] = path.read_bytes()
        return found

    def check_whole(self, stage: Stage) -> None:
        """Raises Failure unless each result is whole: all of this run's, of the earlier one's or of before."""
        found = {name: content for name, content in self.results(stage).items() if not name.startswith(_GROWING)}
        for top in {name.split("/")[0] for name in found if not name.startswith("generations/")}:
            these = {name: content for name, content in found.items() if name.startswith(f"{top}/")}
            wholes = [
                {name: content for name, content in whole.items() if name.startswith(f"{top}/")}
                for whole in (stage.expected, stage.earlier, stage.before)
            ]
            if these not in wholes:
                raise Failure(f"{top} is neither what was there before nor what was being made")
        for name, content in found.items():
            if content not in (stage.expected.get(name), stage.earlier.get(name), stage.before.get(name)):
                raise Failure(f"{name} is neither what was there before nor what was being made")

    def check_result(self, stage: Stage) -> None:
        """Raises Failure unless the results are those of the uninterrupted run, byte for byte."""
        found, expected = self.results(stage), stage.expected
        different = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        if different:
            raise Failure(f"not what the uninterrupted run made: {', '.join(different)}")
        hidden = [path for path in self.run.rglob(".*") if path.name != ".lock"]
        if hidden:
            raise Failure(f"left lying about: {hidden[0].relative_to(self.run)}")
