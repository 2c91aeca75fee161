"""The record of benchmarks/results.py: a line per experiment, with the sums that decide each score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.held_out import shown_of

# Metrics that docs/results.md shows.
KEPT = (
    "perplexity.token", "perplexity.bits_per_byte", "bleu", "rouge_l", "f1", "hits_at_1", "persona_f1", "persona_coverage",
    "persona_gain", "swap_accuracy", "stopped_by_eos", "length_ratio",
)  # fmt: skip


def read_record(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Adds lines in one write, so that those of several threads do not mix."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def validation_of(run: Path) -> list[float]:
    """Losses of train.py's evaluations, in nats per reply token."""
    log = run / "logs" / "training.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return [round(line["eval_loss"], 4) for line in lines if "eval_loss" in line]


def scores_of(run: Path, system: str) -> dict[str, Any]:
    """Sums of each metric's statistics per test dialogue, and the answers to the dialogues that are shown."""
    from kestrel.evaluation.generations import read_generations

    replies = read_generations(run / "generations" / f"test.{system}.jsonl").replies
    dialogues = sorted({reply.dialogue_id for reply in replies})
    shown = {name: [r.response for r in replies if r.dialogue_id == name] for name in shown_of(dialogues)}
    return {"sums": sums_of(replies), "answers": shown}


def sums_of(replies: Any) -> dict[str, list[list[float]]]:
    """By metric, a row per dialogue (in the order of their ids): sums over its replies."""
    from kestrel.evaluation.metrics import Choices
    from kestrel.evaluation.systems import System, statistics_of

    names, members = np.unique([reply.dialogue_id for reply in replies], return_inverse=True)
    sums = {}
    statistics = statistics_of(System("system", "", replies), Choices())
    for metric, array in ((name, statistics[name]) for name in KEPT if name in statistics):
        of_dialogues = np.zeros((len(names), array.shape[1]))
        np.add.at(of_dialogues, members, array)
        sums[metric] = [[int(n) if n == int(n) else round(n, 3) for n in row] for row in of_dialogues.tolist()]
    return sums


def trivial(work: Path) -> list[dict[str, Any]]:
    """Lines of the systems that need no model, for the contexts of any answers in the folder of runs."""
    from kestrel.evaluation.generations import read_generations
    from kestrel.evaluation.trivial_systems import trivial_systems

    answers = sorted(work.glob("*/generations/test.*.jsonl"))
    if not answers:
        return []
    contexts = read_generations(answers[0]).replies
    rows = [json.loads(line) for line in (work / "dialogues" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    search = [turn["text"] for row in rows for turn in row["turns"] if turn["speaker"] == "self"]
    made, _ = trivial_systems(contexts, 0, search)
    return [{"arm": name, "seed": 0, "sums": sums_of(system.replies)} for name, system in made.items()]
