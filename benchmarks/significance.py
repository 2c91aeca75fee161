"""Whether the intervals and tests of evaluate.py hold for few dialogues, by simulation.

    python benchmarks/significance.py --output benchmarks/results/significance.json [--text FILE]

The population is a set of dialogues in which systems answer with references that were damaged at random: how much differs
between dialogues and between replies, as it does for models. Each trial draws dialogues from it and runs evaluate.py's own
code. Reported, for each number of dialogues:

- false alarms: two equal systems are called different at p < 0.05, where each dialogue's two answers change places by
  chance; by the exchange test and by the paired bootstrap that it replaces;
- power: the same for a system that is a little better;
- coverage: how often the 95% interval holds the population's score, or difference of scores; by the studentized bootstrap
  and by the percentiles that it replaces.
"""

from __future__ import annotations

import argparse
import random
import sys
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
from kestrel.evaluation.resampling import Array, Dialogues, pseudo_values
from kestrel.evaluation.systems import System, score

METRICS = ("f1", "bleu")
COUNTS = (2, 3, 5, 6, 10, 20, 50, 100, 1000)
_RESAMPLES = 399


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


def old_methods(first: Array, second: Array, compute: resampling.Score, seed: int) -> tuple[bool, list[float]]:
    """Whether the paired bootstrap rejects, shifted to no difference, and the percentile interval of the difference."""
    count = len(first)
    picks = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    drawn = compute(picks @ first.astype(float)) - compute(picks @ second.astype(float))
    observed = (compute(first.sum(0)[None]) - compute(second.sum(0)[None]))[0]
    p_value = ((np.abs(drawn - observed) >= abs(observed)).sum() + 1) / (_RESAMPLES + 1)
    return p_value < 0.05, list(np.percentile(drawn, [2.5, 97.5]))


def trial(sums: dict[str, dict[str, Array]], metric: str, count: int, seed: int) -> dict[str, bool | None]:
    """One sample of dialogues: what each method says, and whether its interval holds the truth."""
    generator = np.random.default_rng(seed)
    compute = BY_NAME[metric].score
    chosen = generator.integers(0, len(sums["one"][metric]), size=count)
    one, two, better = (sums[name][metric][chosen] for name in ("one", "two", "better"))
    swap = generator.integers(0, 2, size=(count, 1), dtype=bool)
    equal = np.where(swap, two, one), np.where(swap, one, two)
    dialogues = Dialogues([str(number) for number in range(count)], _RESAMPLES, seed)
    p_values = dialogues.p_values({"false alarms": (*equal, compute), "power": (better, one, compute)})
    points = {name: compute(rows.sum(0)[None])[0] for name, rows in (("better", better), ("one", one))}
    truth = {name: compute(sums[name][metric].sum(0)[None])[0] for name in ("better", "one")}
    pseudo = {name: pseudo_values(rows, compute) for name, rows in (("better", better), ("one", one))}
    pseudo["difference"] = pseudo["better"] - pseudo["one"]
    for values in (points, truth):
        values["difference"] = values["better"] - values["one"]
    intervals = dialogues.intervals(pseudo, points)
    found: dict[str, bool | None] = {name: p is not None and p < 0.05 for name, p in p_values.items()}
    for name, key in (("one", "coverage"), ("difference", "coverage of differences")):
        interval = intervals[name]
        found[key] = None if interval is None else bool(interval[0] <= truth[name] <= interval[1])
    found["false alarms of the paired bootstrap"], _ = old_methods(*equal, compute, seed)
    found["power of the paired bootstrap"], (low, high) = old_methods(better, one, compute, seed)
    found["coverage of differences by percentiles"] = bool(low <= truth["difference"] <= high)
    return found


def simulated(text: str, trials: int, seed: int) -> list[dict[str, Any]]:
    """A row for each metric and number of dialogues, with the share of the trials by what was counted."""
    sums = population(text, seed)
    resampling.EXCHANGES = _RESAMPLES  # enough for a decision at 5%, and many trials
    rows = []
    for metric in METRICS:
        for count in COUNTS:
            samples = trials // 6 if metric == "bleu" else trials  # sacreBLEU takes most of the time
            done = [trial(sums, metric, count, seed + number) for number in range(samples)]
            shares = {key: [bool(row[key]) for row in done if row[key] is not None] for key in done[0]}
            row = {key: float(np.mean(values)) if values else None for key, values in shares.items()}
            rows.append({"metric": metric, "dialogues": count, "trials": samples} | row)
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
        help="samples for each number of dialogues (4,000); a sixth for BLEU",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the population and the samples (0)")
    options = parser.parse_args(argv)
    return told(lambda: measured(options, command_of("significance.py", argv)))


def measured(options: argparse.Namespace, command: str) -> int:
    """Runs it and writes the record."""
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    rows = simulated(options.text, options.trials, options.seed)
    if options.output:
        record = {"command": command, "versions": library_versions(), "commit": git_commit(), "seed": options.seed}
        record["date"] = datetime.now(tz=UTC).date().isoformat()
        write_json(options.output, record | {"results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
