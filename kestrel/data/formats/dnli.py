"""Dialogue NLI's evaluation sets: a context, its reply, and candidates that contradict the persona, or say something else.

Reference: Welleck et al. 2019, https://arxiv.org/abs/1811.00671.
"""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile

COLUMNS = [{"persona", "prefix", "candidates"}]

_WRONG = ("neg", "neutral", "rand")


def read(file: SourceFile) -> Iterator[RawDialogue]:
    for index, row in enumerate(file.rows()):
        offered = row.object("candidates")
        reply = offered.texts("label") if "label" in offered.values else row.texts("eval_labels")
        if len(reply) != 1:
            raise (offered if "label" in offered.values else row).unexpected("label", "a list of one text")
        wrong = tuple(text for key in _WRONG if key in offered.values for text in offered.texts(key))
        said = row.texts("prefix")
        turns = [RawTurn("partner" if (len(said) - at) % 2 else "self", text) for at, text in enumerate(said)]
        turns.append(RawTurn("self", reply[0], wrong))
        yield RawDialogue(row.where, file.dialogue_id(index), row.texts("persona"), tuple(turns))
