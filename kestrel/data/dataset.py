"""The dataset artifact: tokenized dialogues in Arrow, what they look like in numbers, and whether they still fit."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.config.settings import Settings
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt, Rendered, Unrenderable
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import MANIFEST, read_manifest, require_equal

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000  # dialogues that are rendered together


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
    from kestrel.data.arrow import SplitWriter, rows_of

    statistics = SplitStatistics()
    stream = iter(dialogues)
    with SplitWriter(folder) as writer:
        while batch := list(islice(stream, _BATCH)):
            if rendered := list(_counted(batch, prompt, statistics)):
                writer.write(rows_of(rendered))
    return statistics


def _counted(batch: list[Dialogue], prompt: Prompt, statistics: SplitStatistics) -> Iterator[tuple[Dialogue, Rendered]]:
    for dialogue, rendered in zip(batch, prompt.render_all(batch), strict=True):
        if isinstance(rendered, Unrenderable):
            statistics.dropped[rendered.reason] += 1
            continue
        statistics.dialogues += 1
        statistics.replies += len(rendered.reply_spans)
        statistics.tokens += len(rendered.input_ids)
        statistics.supervised_tokens += sum([end - start for start, end in rendered.reply_spans])
        statistics.truncated_dialogues += rendered.first_turn > 0
        statistics.turns_cut += rendered.first_turn
        statistics.replies_cut += sum([turn.speaker == "self" for turn in dialogue.turns[: rendered.first_turn]])
        statistics.lengths.append(len(rendered.input_ids))
        yield dialogue, rendered


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


def supervised_of(dataset: Dataset) -> np.ndarray:
    """Supervised tokens of each row, int64, without reading them."""
    import pyarrow.compute as pc

    if not len(dataset):
        return np.zeros(0, np.int64)
    spans_of_rows = dataset.with_format("arrow")[:]["reply_spans"].combine_chunks()
    rows = np.asarray(pc.list_parent_indices(spans_of_rows))
    spans = np.asarray(pc.list_flatten(pc.list_flatten(spans_of_rows))).reshape(-1, 2)
    return np.bincount(rows, weights=spans[:, 1] - spans[:, 0], minlength=len(dataset)).astype(np.int64)
