"""The dataset artifact: tokenized dialogues in Arrow, and whether they still fit a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kestrel.config.settings import Data, Settings
from kestrel.data.persona_file import given_sentences
from kestrel.data.report import SplitStatistics
from kestrel.data.spelling import Spelling
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import IGNORED, Prompt, Rendered, Unrenderable
from kestrel.runtime.manifest import MANIFEST, read_manifest, require_equal, sha256_of
from kestrel.runtime.output import steer

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000  # dialogues that are rendered together
_ADDED_KEYS = ("self", "persona", "session_gap", "earlier_sessions", "redact")
_ARROW_FILE = "data-00000-of-00001.arrow"


def write_split(dialogues: Iterable[Dialogue], prompt: Prompt, folder: Path) -> SplitStatistics:
    """Renders dialogues and writes them into a new folder as `Dataset.save_to_disk` does, a batch in memory.

    `Dataset.from_generator` and `save_to_disk` write the same rows twice, and a fingerprint that differs each time.
    """
    from datasets import DatasetInfo, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    texts, integers = List(Value("string")), List(Value("int32"))
    features = Features(
        {
            "dialogue_id": Value("string"),
            "persona": texts,
            "partner_persona": texts,
            "turns": List({"speaker": Value("string"), "text": Value("string")}),
            "candidates": List(texts),
            "input_ids": integers,
            "labels": integers,
            "reply_spans": List(integers),
        }
    )
    statistics, spelling = SplitStatistics(), Spelling(prompt.tokenizer)
    remaining = iter(dialogues)
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / _ARROW_FILE), features=features) as writer:
        while batch := list(islice(remaining, _BATCH)):
            for dialogue, rendered in zip(batch, prompt.render_all(batch), strict=True):
                if isinstance(rendered, Unrenderable):
                    statistics.dropped[rendered.reason] += 1
                else:
                    statistics.add(dialogue, rendered, spelling)
                    writer.write(_row(dialogue, rendered))
        writer.finalize()
    DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": _ARROW_FILE}],
        "_fingerprint": sha256_of(folder / _ARROW_FILE)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return statistics


def _row(dialogue: Dialogue, rendered: Rendered) -> dict[str, Any]:
    row = vars(dialogue) | vars(rendered) | {"labels": rendered.labels}
    row["turns"] = [turn._asdict() for turn in dialogue.turns]
    for key in ("conversation_id", "first_turn"):
        del row[key]
    return row


def dialogue_of(row: dict[str, Any]) -> Dialogue:
    """The dialogue that a dataset row was made of."""
    return Dialogue(
        row["dialogue_id"],
        tuple(row["persona"]),
        tuple(Turn(turn["speaker"], turn["text"]) for turn in row["turns"]),
        partner_persona=tuple(row["partner_persona"]),
        candidates=tuple(tuple(options) for options in row["candidates"]),
    )


def settings_that_shape(settings: Settings) -> dict[str, Any]:
    """The settings on which the dataset depends; of those that datasets of version 0.1.0 lack, only what is set."""
    prompt = {"format", "max_length"}  # the prompt's identity holds the rest
    shaping = settings.model_dump(include={"data": True, "prompt": prompt, "seed": True}, exclude={"data": {"dataset"}})
    shaping["data"]["persona"] = list(given_sentences(tuple(settings.data.persona)))
    for key in _ADDED_KEYS:
        if shaping["data"][key] == Data.model_fields[key].default:
            del shaping["data"][key]
    return shaping


def open_dataset(settings: Settings, prompt: Prompt, command: str) -> tuple[Path, dict[str, Any]]:
    """Checks that the run's dataset is complete and was made with these settings, this tokenizer and this prompt.

    Another run's may have been split with another seed.

    Args:
        command: what creates the dataset, for messages.

    Returns:
        Its folder and its manifest.

    Raises:
        KestrelError: missing, damaged, or made with other settings; names what differs.
    """
    folder = settings.dataset_dir
    what, remedy = f"the dataset in {folder}", f"make it with: {command}"
    if settings.data.dataset is not None:
        remedy = "name one made with these settings in data.dataset, or leave that out and run preprocess.py"
    if not (folder / MANIFEST).exists():
        raise KestrelError(f"there is no dataset in {folder}; {remedy}")
    manifest = read_manifest(folder, "dataset", remedy)
    expected = settings_that_shape(settings)
    if settings.data.dataset is not None or folder.is_symlink():
        expected["seed"] = manifest["settings"].get("seed")
    require_equal(what, manifest["settings"], expected, remedy)
    require_equal(what, {"prompt": manifest.get("prompt")}, {"prompt": prompt.identity()}, remedy)
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
    """Tokens of each row, int64, from the lists' lengths."""
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(_column(dataset, "input_ids"))).astype(np.int64)


def supervised_of(dataset: Dataset) -> np.ndarray:
    """Supervised tokens of each row, int64, from the reply spans."""
    import pyarrow.compute as pc

    spans_of_rows = _column(dataset, "reply_spans")
    rows = np.asarray(pc.list_parent_indices(spans_of_rows))
    spans = np.asarray(pc.list_flatten(pc.list_flatten(spans_of_rows))).reshape(-1, 2)
    return np.bincount(rows, weights=spans[:, 1] - spans[:, 0], minlength=len(dataset)).astype(np.int64)


def _column(dataset: Dataset, name: str) -> Any:
    """A column as one Arrow array."""
    return dataset.with_format("arrow")[:][name].combine_chunks()


def print_rows(dataset: Dataset, prompt: Prompt, count: int) -> None:
    """Prints the first rows as the model sees them, supervised tokens in green or in [brackets]."""
    in_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if in_color else ("[", "]")
    mark = steer if in_color else partial(print, end="")
    for row in dataset.select(range(min(count, len(dataset)))):
        ids, supervised = row["input_ids"], [label != IGNORED for label in row["labels"]]
        print(f"\n── {row['dialogue_id']}: {len(ids)} tokens, {sum(supervised)} supervised " + "─" * 20)
        start = 0
        for is_supervised, run in groupby(supervised):
            end = start + len(list(run))
            text = prompt.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
            mark(before if is_supervised else "")
            print(text, end="")
            mark(after if is_supervised else "")
            start = end
        print()
