"""Seconds and memory of preprocess.py over generated dialogues, from ten thousand to a million.

    python benchmarks/preprocess.py --dialogues 10000 100000
    python benchmarks/preprocess.py --dialogues 1000000 --work /scratch --text train_self_original.txt

The dialogues have ConvAI2's statistics: four or five sentences of persona, seven or eight exchanges, 12 words a turn,
a persona for 18 dialogues. Their words are drawn from real or embedded dialogues by frequency. They are written in ParlAI's
text form, and preprocess.py reads them as a user would run it, in a process of its own, whose peak resident memory is
recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.options import at_least_one, command_of, parser_of, told

DIALOGUES_A_PERSONA = 18
_SAMPLED_EVERY = 0.1  # seconds


class Words:
    """Draws sentences whose words are as frequent as in a text."""

    def __init__(self, text: str, seed: int):
        from kestrel.config.settings import Data
        from kestrel.data.corpus import open_corpus
        from kestrel.data.reading import Reading

        counts: Counter[str] = Counter()
        for dialogue, *_ in Reading(open_corpus(Data(source=text)), "train").dialogues():
            for said in (*dialogue.persona, *(turn.text for turn in dialogue.turns)):
                counts.update(re.findall(r"[^\W_]+|[.,!?]", said.lower()))
        self._words = list(counts)
        self._bounds = list(accumulate(counts.values()))
        self.draw = random.Random(seed)

    def sentences(self, mean: float, deviation: float, shortest: int, count: int) -> Iterator[str]:
        """Sentences whose numbers of words are normally distributed, in words."""
        lengths = [max(shortest, round(self.draw.gauss(mean, deviation))) for _ in range(count)]
        words = self.draw.choices(self._words, cum_weights=self._bounds, k=sum(lengths))
        start = 0
        for length in lengths:
            yield " ".join(words[start : start + length])
            start += length


def write_dialogues(path: Path, count: int, words: Words) -> None:
    """Generated dialogues in ParlAI's text form."""
    personas = [
        list(words.sentences(6.7, 2.5, 2, words.draw.choice([4, 5])))
        for _ in range(max(40, count // DIALOGUES_A_PERSONA))
    ]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            lines = [f"your persona: {sentence}" for sentence in words.draw.choice(personas)]
            said = list(words.sentences(11.7, 3.8, 1, 2 * words.draw.choice([7, 7, 8, 8, 8])))
            lines += [f"{one}\t{other}" for one, other in zip(said[::2], said[1::2], strict=True)]
            file.writelines(f"{number} {line}\n" for number, line in enumerate(lines, 1))


def peak_memory(process: int) -> int:
    """The most resident memory that a process has had so far, in bytes; 0 once it has ended. Linux only."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def measure(source: Path, run: Path, config: str, extra: list[str]) -> dict[str, Any]:
    """Runs preprocess.py over a source; time, memory and bytes that it took."""
    command = [sys.executable, "preprocess.py", "--config", config, "--data.source", str(source), "--run_dir", str(run)]
    began, before, peak = time.monotonic(), processor_seconds(), 0
    with open(run.with_suffix(".log"), "w+", encoding="utf-8") as log:
        process = subprocess.Popen([*command, *extra], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, peak_memory(process.pid))
            time.sleep(_SAMPLED_EVERY)
        seconds = time.monotonic() - began
        log.seek(0)
        printed = log.read()
    if process.returncode:
        raise SystemExit(f"preprocess.py failed:\n{printed[-3000:]}")
    statistics = json.loads((run / "dataset" / "statistics.json").read_text(encoding="utf-8"))["splits"]
    written = sum(path.stat().st_size for path in (run / "dataset").rglob("*") if path.is_file())
    dialogues = sum(split["dialogues"] for split in statistics.values())
    return {
        "dialogues": dialogues,
        "tokens": sum(split["tokens"] for split in statistics.values()),
        "seconds": round(seconds, 1),
        "dialogues_a_second": round(dialogues / seconds),
        "cpu_seconds": round(processor_seconds() - before, 1),
        "peak_resident_bytes": peak,
        "source_bytes": source.stat().st_size,
        "dataset_bytes": written,
    }


def processor_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor() -> str:
    """Name of the CPU."""
    try:
        named = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--dialogues", type=at_least_one, nargs="+", default=[10_000, 100_000], metavar="N")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for sources and datasets, 5 GB a million dialogues")
    parser.add_argument("--output", type=Path, help="folder of the results; without it they are only printed")
    parser.add_argument("arguments", nargs="*", help="more arguments for preprocess.py, after --")
    options = parser.parse_args(argv)
    return told(lambda: measured(options, command_of("preprocess.py", argv)))


def measured(options: argparse.Namespace, command: str) -> int:
    """Measures one size after the other, prints what each took, and writes the records."""
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    for count in options.dialogues:
        work = Path(tempfile.mkdtemp(prefix="preprocess-", dir=options.work))
        try:
            source = work / "dialogues.txt"
            write_dialogues(source, count, Words(options.text, options.seed))
            busy = os.getloadavg()[0]
            taken = measure(source, work / "run", options.config, options.arguments)
        finally:
            shutil.rmtree(work)
        print(json.dumps(taken), flush=True)
        if options.output:
            record = {
                "command": command,
                "machine": {
                    "processor": processor(),
                    "cores": len(os.sched_getaffinity(0)),
                    "load_before": round(busy, 1),
                },
                "versions": library_versions(),
                "commit": git_commit(),
                "date": datetime.now(tz=UTC).date().isoformat(),
                **taken,
            }
            write_json(options.output / f"preprocess-{count}.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
