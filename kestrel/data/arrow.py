"""The Arrow file of a split, as `Dataset.save_to_disk` lays it out, written without a list for every token.

The library `datasets` reads it; writing with it would import pandas and turn arrays into lists and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from kestrel.dialogue import Dialogue
from kestrel.prompt.prompt import IGNORED, Rendered
from kestrel.runtime.manifest import sha256_of

_DATA = "data-00000-of-00001.arrow"
_TEXT, _INTEGER = {"dtype": "string", "_type": "Value"}, {"dtype": "int32", "_type": "Value"}


def _list(feature: dict[str, Any]) -> dict[str, Any]:
    return {"feature": feature, "_type": "List"}


# The columns in the notation of `datasets` (5.2), which looks for it in the schema's metadata.
FEATURES: dict[str, Any] = {
    "dialogue_id": _TEXT,
    "persona": _list(_TEXT),
    "partner_persona": _list(_TEXT),
    "turns": _list({"speaker": _TEXT, "text": _TEXT}),
    "candidates": _list(_list(_TEXT)),
    "input_ids": _list(_INTEGER),
    "labels": _list(_INTEGER),
    "reply_spans": _list(_list(_INTEGER)),
}
_TURN = pa.struct([("speaker", pa.string()), ("text", pa.string())])
_SCHEMA = pa.schema(
    {
        "dialogue_id": pa.string(),
        "persona": pa.list_(pa.string()),
        "partner_persona": pa.list_(pa.string()),
        "turns": pa.list_(_TURN),
        "candidates": pa.list_(pa.list_(pa.string())),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "reply_spans": pa.list_(pa.list_(pa.int32())),
    },
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


class SplitWriter:
    """Writes the rows of one split, batch by batch; nothing is held in memory.

    Args:
        folder: of the split; it is made.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True)
        self._file = pa.ipc.new_stream(str(folder / _DATA), _SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if error is None:
            self._describe()

    def write(self, rows: pa.RecordBatch) -> None:
        """Appends rows."""
        self._file.write_batch(rows)

    def _describe(self) -> None:
        """What `save_to_disk` adds beside the data: the description and the list of files."""
        info = {"description": "", "citation": "", "homepage": "", "license": "", "features": FEATURES}
        (self._folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        state: dict[str, Any] = {
            "_data_files": [{"filename": _DATA}],
            "_fingerprint": sha256_of(self._folder / _DATA)[:16],  # the library's own depends on the path
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def rows_of(rendered: Sequence[tuple[Dialogue, Rendered]]) -> pa.RecordBatch:
    """Rows for dialogues and their tokens."""
    dialogues = [dialogue for dialogue, _ in rendered]
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    offers = [texts for dialogue in dialogues for texts in dialogue.candidates]
    spans = [each.reply_spans for _, each in rendered]
    lengths = [len(each.input_ids) for _, each in rendered]
    ids = np.fromiter(chain.from_iterable(each.input_ids for _, each in rendered), np.int32, sum(lengths))
    said = pa.StructArray.from_arrays(
        [_strings([turn.speaker for turn in turns]), _strings([turn.text for turn in turns])], fields=list(_TURN)
    )
    columns = [
        _strings([dialogue.dialogue_id for dialogue in dialogues]),
        _texts([dialogue.persona for dialogue in dialogues]),
        _texts([dialogue.partner_persona for dialogue in dialogues]),
        _lists([len(dialogue.turns) for dialogue in dialogues], said),
        _lists([len(dialogue.candidates) for dialogue in dialogues], _texts(offers)),
        _lists(lengths, _integers(ids)),
        _lists(lengths, _integers(_labels(ids, lengths, spans))),
        _lists([len(each) for each in spans], _pairs(spans)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def first_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a split that was just written, as dictionaries."""
    rows: list[dict[str, Any]] = []
    with pa.ipc.open_stream(str(folder / _DATA)) as stream:
        for batch in stream:
            rows += batch.slice(0, count - len(rows)).to_pylist()
            if len(rows) == count:
                break
    return rows


# Arrays are made of buffers: `pa.array` would import pandas, to look whether it was given something of pandas.


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    """Where lists of these lengths begin in their joined values, and where the last one ends: int32, (lists + 1,)."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def _integers(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _strings(texts: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    buffers = [None, pa.py_buffer(_offsets(map(len, encoded))), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.Array:
    buffers = [None, pa.py_buffer(_offsets(lengths))]
    return pa.Array.from_buffers(pa.list_(values.type), len(lengths), buffers, children=[values])


def _texts(lists: Sequence[Sequence[str]]) -> pa.Array:
    return _lists([len(each) for each in lists], _strings(list(chain.from_iterable(lists))))


def _pairs(spans: Sequence[Sequence[tuple[int, int]]]) -> pa.Array:
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(spans)), np.int32)
    return _lists([2] * (len(flat) // 2), _integers(flat))


def _labels(ids: np.ndarray, lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
    """The ids where supervised, -100 elsewhere: int32 of the ids' shape."""
    # +1 where a reply begins and -1 where it ends: the running sum tells what lies within one.
    steps = np.zeros(len(ids) + 1, np.int8)
    starts = np.repeat(_offsets(lengths)[:-1], [len(each) for each in spans])
    bounds = np.fromiter(chain.from_iterable(chain.from_iterable(spans)), np.int32).reshape(-1, 2)
    steps[starts + bounds[:, 0]] += 1
    steps[starts + bounds[:, 1]] -= 1
    return np.where(np.cumsum(steps[:-1], dtype=np.int8) > 0, ids, np.int32(IGNORED))
