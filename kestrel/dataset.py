"""The dataset artifact: tokenized dialogues in Arrow, what they look like in numbers, and whether they still fit."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.artifacts import MANIFEST, read_manifest, require_equal, sha256_of, write_json
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt import Prompt, Unrenderable
from kestrel.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_A_BATCH = 1000


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        {
            "dialogue_id": Value("string"),
            "persona": List(Value("string")),
            "partner_persona": List(Value("string")),
            "turns": List({"speaker": Value("string"), "text": Value("string")}),
            "candidates": List(List(Value("string"))),
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "reply_spans": List(List(Value("int32"))),
        }
    )


@dataclass
class SplitStatistics:
    """Counts of one split, filled while it is written."""

    dialogues: int = 0
    replies: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_dialogues: int = 0
    turns_cut: int = 0
    replies_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("i"), repr=False)

    def as_json(self) -> dict[str, Any]:
        """The counts, and shares and percentiles made of them. Lengths are in tokens."""
        lengths = np.asarray(self.lengths if self.lengths else [0])
        return {
            "dialogues": self.dialogues,
            "replies": self.replies,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / max(1, self.tokens),
            "tokens_a_dialogue": {
                "mean": float(lengths.mean()),
                **{f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95)},
                "max": int(lengths.max()),
            },
            "truncated_dialogues": self.truncated_dialogues,
            "turns_cut": self.turns_cut,
            "replies_cut": self.replies_cut,
            "dropped_at_rendering": dict(self.dropped),
        }

    def why_dropped(self) -> str:
        """What rendering dropped, by reason, on one line."""
        return "; ".join(f"{count:,}: {reason}" for reason, count in self.dropped.most_common()) or "there was none"


def write_split(dialogues: Iterable[Dialogue], prompt: Prompt, folder: Path) -> SplitStatistics:
    """Renders dialogues and writes them as a `datasets` folder, holding no more than a batch in memory.

    Args:
        dialogues: consumed once.
        prompt: how they become tokens.
        folder: where the split is written, by `Dataset.save_to_disk`'s layout.
    """
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    statistics = SplitStatistics()
    folder.mkdir(parents=True)
    data = folder / "data-00000-of-00001.arrow"
    with ArrowWriter(path=str(data), features=_features()) as writer:
        stream = iter(dialogues)
        while batch := list(islice(stream, _ROWS_A_BATCH)):
            rows = list(_rows(batch, prompt, statistics))
            if rows:
                writer.write_batch({name: [row[name] for row in rows] for name in rows[0]})
        writer.finalize()
    # The Arrow file is in place; what save_to_disk adds beside it is the description and the list of files.
    written = Dataset.from_file(str(data))
    written.info.write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": data.name}],
        "_fingerprint": sha256_of(data)[:16],  # the library's own depends on the path
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return statistics


def _rows(batch: list[Dialogue], prompt: Prompt, statistics: SplitStatistics) -> Iterator[dict[str, Any]]:
    for dialogue, rendered in zip(batch, prompt.render_all(batch), strict=True):
        if isinstance(rendered, Unrenderable):
            statistics.dropped[rendered.reason] += 1
            continue
        labels = rendered.labels
        statistics.dialogues += 1
        statistics.replies += len(rendered.reply_spans)
        statistics.tokens += len(labels)
        statistics.supervised_tokens += sum(end - start for start, end in rendered.reply_spans)
        statistics.truncated_dialogues += rendered.first_turn > 0
        statistics.turns_cut += rendered.first_turn
        statistics.replies_cut += sum(turn.speaker == "self" for turn in dialogue.turns[: rendered.first_turn])
        statistics.lengths.append(len(labels))
        yield {
            "dialogue_id": dialogue.dialogue_id,
            "persona": list(dialogue.persona),
            "partner_persona": list(dialogue.partner_persona),
            "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in dialogue.turns],
            "candidates": [list(options) for options in dialogue.candidates],
            "input_ids": rendered.input_ids,
            "labels": labels,
            "reply_spans": [list(span) for span in rendered.reply_spans],
        }


def dialogue_of(row: dict[str, Any]) -> Dialogue:
    """The dialogue that a dataset row was made of."""
    return Dialogue(
        row["dialogue_id"],
        tuple(row["persona"]),
        tuple(Turn(turn["speaker"], turn["text"]) for turn in row["turns"]),
        partner_persona=tuple(row["partner_persona"]),
        candidates=tuple(tuple(options) for options in row["candidates"]),
    )


def write_statistics(folder: Path, statistics: dict[str, SplitStatistics], corpus: dict[str, Any]) -> dict[str, Any]:
    """Writes statistics.json: what each split holds, and what reading the corpus dropped and repaired."""
    content = {"splits": {split: counts.as_json() for split, counts in statistics.items()}, "corpus": corpus}
    write_json(folder / "statistics.json", content)
    return content


def settings_that_shape(settings: Settings) -> dict[str, Any]:
    """The settings that decide what is in the dataset."""
    data = settings.data.model_dump()
    return {"data": data, "prompt": settings.prompt.model_dump(), "seed": settings.seed}


def open_dataset(settings: Settings, prompt: Prompt, command: str) -> tuple[Path, dict[str, Any]]:
    """Checks that the run's dataset is whole and was made with these settings, this tokenizer and this prompt.

    Args:
        settings: of this run.
        prompt: as this run renders.
        command: the command that makes the dataset, for messages.

    Returns:
        Its folder and its manifest.

    Raises:
        KestrelError: missing, damaged, or made otherwise; naming what differs.
    """
    folder = Path(settings.run_dir) / "dataset"
    remedy = f"make it with: {command}"
    if not (folder / MANIFEST).exists():
        raise KestrelError(f"there is no dataset in {folder}; {remedy}")
    manifest = read_manifest(folder, "dataset", remedy)
    require_equal(f"the dataset in {folder}", manifest["settings"], settings_that_shape(settings), remedy)
    recorded, current = manifest.get("prompt"), prompt.identity()
    require_equal(f"the dataset in {folder}", {"prompt": recorded}, {"prompt": current}, remedy)
    return folder, manifest


def load_split(folder: Path, split: str, remedy: str) -> Dataset:
    """Memory-mapped rows of one split.

    Raises:
        KestrelError: the split is missing or its Arrow file cannot be read.
    """
    from datasets import load_from_disk

    if not (folder / split).is_dir():
        raise KestrelError(f"the dataset in {folder} has no split {split}; {remedy}")
    try:
        return load_from_disk(str(folder / split))
    except Exception as error:  # noqa: BLE001  Arrow and datasets raise many types on damaged files
        raise KestrelError(f"{folder / split} cannot be read ({error}); {remedy}") from None


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens of each row, int64, without reading them."""
    import pyarrow.compute as pc

    column = dataset.with_format("arrow")[:]["input_ids"] if len(dataset) else []
    return np.asarray(pc.list_value_length(column)).astype(np.int64) if len(dataset) else np.zeros(0, np.int64)
