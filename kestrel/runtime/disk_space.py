"""Disk space: checked before a long stage begins, and named in the message if it runs out later.

The estimates are in bytes.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kestrel.errors import KestrelError

if TYPE_CHECKING:
    from datasets import Dataset

# What a disk that fails, or can only be read, is called: by the system, by safetensors and by torch (2.13).
_BROKEN = ("Input/output error", "Read-only file system", "iostream error", "unexpected pos")
_FULL = 2**20  # bytes; if less is free when a write fails, the disk is full
# Bytes of Arrow per byte of source: 1.0 to 8.0 over the formats of Persona-Chat, most where both sides are learned.
_DATASET_FACTOR = 8
_LARGEST_DIALOGUE = 2**16  # bytes in Arrow; a hundred turns
_CHECKPOINT_BYTES = 12  # per trained weight, with AdamW's two moments
_TOKENIZER_BYTES = 64  # per vocabulary entry in tokenizer.json
_SMALL_FILES = 2**15  # bytes of configurations, manifests and random states in a checkpoint
_LINE_BYTES = 256  # per line of a log; per row of generations besides its texts
_TOKEN_BYTES = 6  # of text per generated token
_REPORT_BYTES = 2**20  # the report's page and plots
_ALTERNATIVE = "give this run another run_dir"


@contextmanager
def room_for(what: str, needed: int, folder: Path, alternative: str = _ALTERNATIVE) -> Iterator[None]:
    """Checks that the disk has space for what the block writes, and explains an error in it if the disk is full.

    Args:
        what: is written, in the plural, for messages.
        needed: bytes.
        folder: where; it need not exist.
        alternative: what to do if no space can be freed.

    Raises:
        KestrelError: not enough space, before or during the block.
    """
    require_room(what, needed, folder, alternative)
    try:
        yield
    except Exception as error:
        if isinstance(error, KestrelError):
            raise
        if _is_full(error, folder):
            advice = _needed_and_free(what, needed, folder, alternative)
            raise KestrelError(f"the disk is full; what was finished is kept. {advice}") from error
        if any(words in str(error) for words in _BROKEN):
            broken = f"{what} could not be written below {folder} ({str(error).splitlines()[0]}); check the disk"
            raise KestrelError(f"{broken}, and run the same command again; what was finished is kept") from error
        raise


def require_room(what: str, needed: int, folder: Path, alternative: str = _ALTERNATIVE) -> None:
    """The check of `room_for`, for what is written later."""
    if shutil.disk_usage(_existing(folder)).free < needed:
        raise KestrelError(f"the disk is too full. {_needed_and_free(what, needed, folder, alternative)}")


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether an error, which torch and safetensors do not raise as OSError, means that no space or quota is left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return (
        "No space left" in str(error)
        or "quota exceeded" in str(error)
        or shutil.disk_usage(_existing(folder)).free < _FULL
    )


def _needed_and_free(what: str, needed: int, folder: Path, alternative: str) -> str:
    free = _readable(shutil.disk_usage(_existing(folder)).free)
    need = f"In {folder}, {what} need about {_readable(needed)}, and {free} are free"
    return f"{need}; free some space and run the same command again, or {alternative}"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _readable(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def dataset_bytes(sources: Sequence[Path], max_dialogues: int | None) -> int:
    """Of the dataset of some source files."""
    size = _DATASET_FACTOR * sum(path.stat().st_size for path in sources)
    return size if max_dialogues is None else min(size, 3 * max_dialogues * _LARGEST_DIALOGUE)


def training_bytes(weights: int, vocabulary: int, steps: int, kept: int, checkpoints: Path) -> int:
    """Of what training still has to write: checkpoints, logs and the adapter.

    Args:
        weights: number of trained weights.
        vocabulary: entries of the tokenizer, which is saved with each checkpoint.
        steps: of the whole run.
        kept: checkpoints that stay on disk, besides the one being written.
        checkpoints: their folder.
    """
    checkpoint = model_bytes(weights, vocabulary, _CHECKPOINT_BYTES)
    written = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    more = max(checkpoint, (kept + 1) * checkpoint - written)
    return more + model_bytes(weights, vocabulary) + steps * _LINE_BYTES


def model_bytes(weights: int, vocabulary: int, each: int = 4) -> int:
    """Of an adapter or a model with its tokenizer, at so many bytes per weight."""
    return each * weights + _TOKENIZER_BYTES * vocabulary + _SMALL_FILES


def answers_bytes(rows: Dataset, max_new_tokens: int, files: int) -> int:
    """Of the generations for rows of the dataset, in files of which one at a time exists twice."""
    size = 0
    for row in rows.select_columns(["persona", "turns"]):
        before = sum(len(sentence.encode()) for sentence in row["persona"]) + _LINE_BYTES
        for turn in row["turns"]:
            text = len(turn["text"].encode())
            if turn["speaker"] == "self":
                size += before + text + max_new_tokens * _TOKEN_BYTES
            before += text + 40  # {"speaker": "partner", "text": ""}
    return (files + 1) * size


def evaluation_bytes(generations: Sequence[Path]) -> int:
    """Of scores, report and responses."""
    return _REPORT_BYTES + 2 * sum(path.stat().st_size for path in generations if path.exists())
