"""Whether the intervals and tests of evaluate.py hold for few dialogues, by simulation.

    python benchmarks/significance.py --output benchmarks/results/significance.json [--text FILE]

The population is a set of dialogues in which systems answer with references that were damaged at random: how much differs
between dialogues and between replies, as it does for models. Each trial draws dialogues from it and runs evaluate.py's own
code. Reported, for each number of dialogues:

- false alarms: two equal systems are called different at p < 0.05, where each dialogue's two answers change places by
  chance; by the exchange test and by the more usual paired bootstrap;
- power: the same for a system that is a little better. A test that raises more false alarms than it says notices more for
  that reason alone, so power is also told at the p-value below which 5% of the equal systems are;
- coverage: how often the 95% interval holds the population's score, or difference of scores; by the studentized bootstrap
  and by the more usual percentiles.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.options import at_least_one, command_of, parser_of, told
from kestrel.evaluation import resampling
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metric_table import BY_NAME
from kestrel.evaluation.metrics import Choices
from kestrel.evaluation.resampling import Array, Dialogues, draw_with_replacement, pseudo_values
from kestrel.evaluation.systems import System, score

METRICS = ("f1", "bleu")
COUNTS = (2, 3, 5, 6, 10, 20, 50, 100, 1000)
LEVEL = 0.05
_DRAWS = 999  # enough for a decision at 5%, so that there is time for many trials


def damaged(text: str, kept: float, words: list[str], draw: random.Random) -> str:
    """A reply of which each word is kept with a probability, replaced or left out."""
    out = []
    for word in text.split():
        if draw.random() < kept:
            out.append(word)
        elif draw.random() < 0.7:
            out.append(draw.choice(words))
    return " ".join(out)


def population(text: str, seed: int) -> dict[str, dict[str, Array]]:
    """Sums over each dialogue, shape (D, K), by metric, of two equal systems and a better one."""
    from kestrel.config.settings import Data
    from kestrel.data.corpus import open_corpus
    from kestrel.data.reading import Reading

    dialogues = [dialogue for dialogue, *_ in Reading(open_corpus(Data(source=text)), "train").dialogues()]
    words = [word for dialogue in dialogues for _, reply in dialogue.replies() for word in reply.split()]
    draw = random.Random(seed)
    answers: dict[str, list[Reply]] = {"one": [], "two": [], "better": []}
    for number, dialogue in enumerate(dialogues):
        quality = draw.gauss(0.35, 0.15)
        for turn, reference in dialogue.replies():
            for name, rows in answers.items():
                kept = draw.gauss(quality, 0.2) + (0.03 if name == "better" else 0)
                rows.append(Reply(f"d{number}", turn, reference, damaged(reference, kept, words, draw), 1))
    systems = {name: System("system", "", rows) for name, rows in answers.items()}
    score(systems, Dialogues([row.dialogue_id for row in answers["one"]], 100, 0), Choices())
    return {name: {metric: system.sums[metric] for metric in METRICS} for name, system in systems.items()}


def usual_methods(first: Array, second: Array, compute: resampling.Score, seed: int) -> tuple[float, list[float]]:
    """The p-value of the paired bootstrap, shifted to no difference, and the percentile interval of the difference."""
    count = len(first)
    picks = draw_with_replacement(np.random.default_rng(seed), _DRAWS, count).astype(np.float64)
    drawn = compute(picks @ first) - compute(picks @ second)
    observed = (compute(first.sum(0)[None]) - compute(second.sum(0)[None]))[0]
    p_value = ((np.abs(drawn - observed) >= abs(observed)).sum() + 1) / (_DRAWS + 1)
    return float(p_value), list(np.percentile(drawn, [2.5, 97.5]))


def trial(sums: dict[str, dict[str, Array]], metric: str, count: int, seed: int) -> dict[str, float | None]:
    """One sample of dialogues: the p-values of equal systems and of a better one, and whether intervals hold the truth."""
    generator = np.random.default_rng(seed)
    compute = BY_NAME[metric].score
    chosen = generator.integers(0, len(sums["one"][metric]), size=count)
    one, two, better = (sums[name][metric][chosen] for name in ("one", "two", "better"))
    swap = generator.integers(0, 2, size=(count, 1), dtype=bool)
    equal = np.where(swap, two, one), np.where(swap, one, two)
    dialogues = Dialogues([str(number) for number in range(count)], _DRAWS, seed)
    found: dict[str, float | None] = {}
    found |= dialogues.p_values({"equal": (*equal, compute), "better": (better, one, compute)}, _DRAWS)
    points = {name: compute(rows.sum(0)[None])[0] for name, rows in (("better", better), ("one", one))}
    truth = {name: compute(sums[name][metric].sum(0)[None])[0] for name in ("better", "one")}
    pseudo = {name: pseudo_values(rows, compute) for name, rows in (("better", better), ("one", one))}
    for values in (points, truth, pseudo):
        values["difference"] = values["better"] - values["one"]
    for name, key in (("one", "coverage"), ("difference", "coverage of differences")):
        interval = dialogues.intervals({name: pseudo[name]}, points, symmetric=name == "difference")[name]
        found[key] = None if interval is None else interval[0] <= truth[name] <= interval[1]
    found["equal, paired bootstrap"], _ = usual_methods(*equal, compute, seed)
    found["better, paired bootstrap"], (low, high) = usual_methods(better, one, compute, seed)
    found["coverage of differences by percentiles"] = low <= truth["difference"] <= high
    return found


def power_at(level: float, equal: Array, better: Array) -> float:
    """The power of a test whose real rate of false alarms is `level`, from its p-values; ties at the limit are split."""
    limit = np.sort(equal)[int(level * len(equal))]
    missing = (level - (equal < limit).mean()) / (equal == limit).mean()
    return float((better < limit).mean() + missing * (better == limit).mean())


def summed_up(trials: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The share of the trials in which each thing was so; None where nothing is said of so few dialogues."""
    row: dict[str, float | None] = {}
    for test in ("", ", paired bootstrap"):
        equal, better = (
            np.array([1.0 if (p := found[f"{kind}{test}"]) is None else p for found in trials])
            for kind in ("equal", "better")
        )
        row[f"false alarms{test}"] = float((equal < LEVEL).mean())
        row[f"power{test}"] = float((better < LEVEL).mean())
        row[f"power at equal false alarms{test}"] = None if (equal == 1).all() else power_at(LEVEL, equal, better)
    for key in ("coverage", "coverage of differences", "coverage of differences by percentiles"):
        held = [value for found in trials if (value := found[key]) is not None]
        row[key] = float(np.mean(held)) if held else None
    return row


def simulated(text: str, trials: int, seed: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each metric and number of dialogues."""
    sums = population(text, seed)
    rows = []
    for metric in METRICS:
        for count in counts:
            done = [trial(sums, metric, count, seed + number) for number in range(trials)]
            row = summed_up(done)
            rows.append({"metric": metric, "dialogues": count, "trials": trials} | row)
            shown = ", ".join(f"{key} {value:.1%}" for key, value in row.items() if value is not None)
            print(f"{metric}, {count:,} dialogues: {shown}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--trials",
        type=at_least_one,
        default=4000,
        help="samples for each number of dialogues (4,000)",
    )
    parser.add_argument(
        "--dialogues", type=at_least_one, nargs="+", default=COUNTS, help="how many, each in turn (2 to 1,000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the population and the samples (0)")
    options = parser.parse_args(argv)
    return told(lambda: measured(options, command_of("significance.py", argv)))


def measured(options: argparse.Namespace, command: str) -> int:
    """Runs it and writes the record."""
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    rows = simulated(options.text, options.trials, options.seed, options.dialogues)
    if options.output:
        record = {"command": command, "versions": library_versions(), "commit": git_commit(), "seed": options.seed}
        record["date"] = datetime.now(tz=UTC).date().isoformat()
        write_json(options.output, record | {"results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
