"""The dialogues of benchmarks/results.py, cut by persona once, so that every recipe trains and answers the same ones."""

from __future__ import annotations

import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.profiles import ROOT, read_dialogues, script
from kestrel.errors import KestrelError

CANDIDATES = 19  # distractors per reply, as many as ConvAI2 has
SHOWN = 3  # dialogues whose answers the record holds
# By persona, so that none of test is in train.
CUT = {"seed": 0, "data.max_dialogues": 1000000, "data.validation_fraction": 0.05, "data.test_fraction": 0.17}


def cut(texts: list[str], work: Path, config: str, model: Path, most: int | None) -> dict[str, Any]:
    """Cuts the dialogues by persona into WORK/dialogues, and the training part into WORK/turns, an example per reply.

    Returns:
        For the record: counts, and the dialogues whose answers are shown.
    """
    from datasets import load_from_disk

    from kestrel.data.dataset import dialogue_of

    everything = [dialogue for text in texts for dialogue in read_dialogues(text)][:most]
    write(work / "all.jsonl", [as_row(d, f"d{n:04}", d.turns) for n, d in enumerate(everything)])
    given = {"run_dir": work / "cut", "data.source": work / "all.jsonl", "model.name": model, **CUT}
    words = [
        "--config",
        str(ROOT / config),
        *(word for key, value in given.items() for word in (f"--{key}", str(value))),
    ]
    if script("preprocess").main(words):
        raise KestrelError("the dialogues could not be cut")
    facts: dict[str, Any] = {"dialogues": {}, "replies": {}}
    for split in ("train", "validation", "test"):
        dialogues = [dialogue_of(row) for row in load_from_disk(str(work / "cut" / "dataset" / split))]
        rows = [as_row(dialogue, dialogue.dialogue_id, dialogue.turns) for dialogue in dialogues]
        turns = [
            as_row(dialogue, f"{dialogue.dialogue_id}-{turn}", dialogue.turns[: turn + 1])
            for dialogue in dialogues
            for turn, _ in dialogue.replies()
        ]
        if split == "test":
            add_candidates(rows, dialogues)
            shown = shown_of([dialogue.dialogue_id for dialogue in dialogues])
            facts["shown"] = [row for row in rows if row["dialogue_id"] in shown]
        write(work / "dialogues" / f"{split}.jsonl", rows)
        write(work / "turns" / f"{split}.jsonl", rows if split == "test" else turns)
        facts["dialogues"][split], facts["replies"][split] = len(rows), len(turns)
    return facts


def add_candidates(rows: list[dict[str, Any]], dialogues: list[Any]) -> None:
    """Gives each reply distractors: replies of other dialogues, none of them twice and none the reference."""
    generator = random.Random(0)
    for row, dialogue in zip(rows, dialogues, strict=True):
        others = sorted({text for other in dialogues if other is not dialogue for _, text in other.replies()})
        row["candidates"] = [
            generator.sample([text for text in others if text != reference], min(CANDIDATES, len(others) - 1))
            for _, reference in dialogue.replies()
        ]


def shown_of(dialogues: list[str]) -> list[str]:
    """The dialogues whose answers are shown: the first by the SHA-256 of their ids, so that nobody chose them."""
    return sorted(dialogues, key=lambda name: sha256(name.encode()).hexdigest())[:SHOWN]


def as_row(dialogue: Any, name: str, turns: Any) -> dict[str, Any]:
    """A dialogue in Kestrel's own form."""
    return {
        "dialogue_id": name,
        "persona": list(dialogue.persona),
        "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in turns],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
