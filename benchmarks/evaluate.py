"""How long evaluate.py takes for all replies of ConvAI2's validation set and several systems.

    python benchmarks/evaluate.py --output benchmarks/results/evaluate.json [--text FILE]

The references are the text's replies, repeated until there are enough. A system's answers are replies of other dialogues
in other orders, with likelihoods drawn at random: the work is the same as for a model's, the scores mean nothing. Of
several runs, the quickest is told: other programs of the machine only add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.options import at_least_one, command_of, parser_of, told

if TYPE_CHECKING:
    from kestrel.dialogue import Dialogue

_CANDIDATES = 19  # distractors of each reply, as in ConvAI2


def contexts(dialogues: list[Dialogue]) -> Iterator[dict[str, Any]]:
    """Endless rows of a generations file without what a model adds, in the order of the dialogues."""
    for number in count():
        for dialogue in dialogues:
            for index, reference in dialogue.replies():
                yield {
                    "dialogue_id": f"{number}-{dialogue.dialogue_id}",
                    "turn": index,
                    "persona": dialogue.persona,
                    "history": [before._asdict() for before in dialogue.turns[:index]],
                    "reference": reference,
                }


def write_generations(path: Path, rows: list[dict[str, Any]], seed: int) -> None:
    """The rows with answers and likelihoods, one JSON object a line."""
    draw = random.Random(seed)
    answers = [row["reference"] for row in rows]
    draw.shuffle(answers)
    with open(path, "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            tokens = len(row["reference"].split()) + 1
            made = {
                "response": answer,
                "stopped_by": "eos",
                "response_tokens": len(answer.split()) + 1,
                "reference_nll": draw.gauss(3.0, 0.5) * tokens,
                "reference_tokens": tokens,
                "candidate_nll": [[draw.gauss(3.5, 0.5) * tokens, tokens] for _ in range(_CANDIDATES)],
            }
            file.write(json.dumps({**row, **made}) + "\n")


def run(work: Path, text: str, replies: int, systems: int, resamples: int, repeats: int) -> dict[str, Any]:
    """Writes the files and times the script so many times; raises KestrelError if it fails."""
    from kestrel.config.settings import Data
    from kestrel.data.corpus import open_corpus
    from kestrel.data.reading import Reading
    from kestrel.errors import KestrelError

    dialogues = [dialogue for dialogue, *_ in Reading(open_corpus(Data(source=text)), "train").dialogues()]
    rows = list(islice(contexts(dialogues), replies))
    files = [work / f"system-{number}.jsonl" for number in range(systems)]
    for number, path in enumerate(files):
        write_generations(path, rows, seed=number)
    output = work / "evaluation"
    given = ["--evaluation.output", str(output), "--evaluation.resamples", str(resamples), "--evaluation.generations"]
    command = [sys.executable, "evaluate.py", *given, *map(str, files)]
    runs = []
    for _ in range(repeats):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise KestrelError(f"evaluate.py failed:\n{done.stderr[-3000:]}")
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        runs.append({"seconds": seconds, "processor_seconds": processor, "load": os.getloadavg()[0]})
    scored = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return {
        "replies": scored["n_replies"],
        "dialogues": scored["n_dialogues"],
        "systems": systems,
        "resamples": resamples,
        **min(runs, key=lambda run: run["seconds"]),
        "runs": runs,
        "peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "report_bytes": (output / "report.html").stat().st_size,
    }


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--replies", type=at_least_one, default=7801, help="replies of each system (ConvAI2's 7,801)")
    parser.add_argument("--systems", type=at_least_one, default=2, help="generation files (2)")
    parser.add_argument("--resamples", type=at_least_one, default=1000, help="of the bootstrap (1,000)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="runs, of which the quickest is told (3)")
    options = parser.parse_args(argv)
    return told(lambda: measured(options, command_of("evaluate.py", argv)))


def measured(options: argparse.Namespace, command: str) -> int:
    """Runs it, prints what it took, and writes the record."""
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.text, options.replies, options.systems, options.resamples, options.repeats)
    print(
        f"evaluate.py: {result['replies']:,} replies of {result['dialogues']:,} dialogues, {result['systems']} systems, "
        f"{result['resamples']:,} resamples: {result['seconds']:.1f} s ({result['processor_seconds']:.1f} s of the processor, "
        f"load {result['load']:.1f}), {result['peak_bytes'] / 2**30:.2f} GiB at the peak"
    )
    if options.output:
        from benchmarks.machine import device_name

        record = {
            "command": command,
            "device": device_name(),
            "versions": library_versions(),
            "commit": git_commit(),
            "date": datetime.now(tz=UTC).date().isoformat(),
            **result,
        }
        write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
