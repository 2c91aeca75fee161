"""The hub set bavard/personachat_truecased: a reply a row, with the history before it; rows of a conversation in a run.

Columns: `personality`, `candidates` (the gold one last), `history`, `conv_id`, `utterance_idx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from kestrel.data.formats.huggingface import turns_of_steps
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.errors import KestrelError

COLUMNS = [{"personality", "candidates", "history", "conv_id"}]


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """
    Raises:
        KestrelError: the rows of one conversation are scattered over the file, or disagree on the persona.
    """
    seen: set[str] = set()
    for conv_id, group in groupby(file.rows(), key=lambda row: row.identifier("conv_id")):
        steps = list(group)
        where = steps[0].where
        if conv_id in seen:
            raise KestrelError(f"{where}: earlier rows have the conv_id {conv_id} too; sort the file by conv_id.")
        seen.add(conv_id)
        persona = steps[0].texts("personality")
        for step in steps:
            if step.texts("personality") != persona:
                raise KestrelError(f"{step.where}: the personality differs from the rows before of conv_id {conv_id}.")
        turns = turns_of_steps(steps, where, file.counts)
        if turns is not None:
            yield RawDialogue(where, f"{file.id_prefix}-{conv_id}", persona, turns)
