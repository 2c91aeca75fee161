"""The hub set bavard/personachat_truecased: a reply a row, with the history before it; rows of a conversation in a run.

Columns: `personality`, `candidates` (the gold one last), `history`, `conv_id`, `utterance_idx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from kestrel.data.formats.huggingface import assemble
from kestrel.data.repair import Draft, stable_hash
from kestrel.data.rows import rows
from kestrel.data.tally import Tally
from kestrel.errors import KestrelError


def read(path: Path, section: str | None, prefix: str, both_sides: bool, tally: Tally) -> Iterator[Draft]:
    """Drafts of one file.

    Raises:
        KestrelError: the rows of one conversation are scattered over the file, or disagree on the persona.
    """
    met: set[int] = set()
    for conv_id, group in groupby(rows(path, section), key=lambda row: row.label("conv_id")):
        steps = list(group)
        where = steps[0].where
        if stable_hash(conv_id) in met:
            raise KestrelError(f"{where}: rows of conv_id {conv_id} stand earlier too; sort the file by conv_id.")
        met.add(stable_hash(conv_id))
        persona = steps[0].texts("personality")
        for step in steps:
            if step.texts("personality") != persona:
                raise KestrelError(f"{step.where}: another personality than the rows before it of conv_id {conv_id}.")
        turns = assemble(steps, where, tally)
        if turns is not None:
            yield Draft(where, f"{prefix}-{conv_id}", persona, turns)
