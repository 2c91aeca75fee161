"""Hugging Face's JSON of ConvAI2 and the hub set AlekseyKorshuk/persona-chat: a dialogue a row, a history a reply.

`personality` is the owner's persona; each of `utterances` has the full `history` up to a reply and its `candidates`,
the gold one last. Reference: https://github.com/huggingface/transfer-learning-conv-ai.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kestrel.data.repair import Draft, Utterance, normalised
from kestrel.data.rows import Row, rows
from kestrel.data.tally import Tally
from kestrel.errors import KestrelError


def read(path: Path, section: str | None, prefix: str, both_sides: bool, tally: Tally) -> Iterator[Draft]:
    """Drafts of one file, or of one section of it."""
    for index, row in enumerate(rows(path, section)):
        turns = assemble(row.objects("utterances"), row.where, tally)
        if turns is not None:
            yield Draft(row.where, f"{prefix}-{index:06d}", row.texts("personality"), turns)


def assemble(steps: Sequence[Row], where: str, tally: Tally) -> tuple[Utterance, ...] | None:
    """Makes one conversation of rows that each hold `history` and `candidates`, the gold reply last.

    The longest history tells the conversation. Each reply must stand in it where its own history ends; otherwise the
    rows contradict each other, the dialogue is counted as dropped, and the result is None.
    """
    if not steps:
        return ()
    histories = [step.texts("history") for step in steps]
    offers = [step.texts("candidates") for step in steps]
    for step, offer in zip(steps, offers, strict=True):
        if not offer:
            raise KestrelError(f"{step.where}: 'candidates' is empty; its last entry must be the gold reply.")
    last = max(range(len(steps)), key=lambda index: len(histories[index]))
    texts = [*histories[last], offers[last][-1]]
    distractors: dict[int, tuple[str, ...]] = {}
    for history, offer in zip(histories, offers, strict=True):
        at = len(history)
        if [normalised(text) for text in (*history[-1:], offer[-1])] != [
            normalised(text) for text in texts[max(at - 1, 0) : at + 1]
        ]:
            tally.read += 1
            tally.drop("histories of its rows contradict each other", where)
            return None
        texts[at] = offer[-1]
        distractors[at] = offer[:-1]
    end = len(texts) - 1
    return tuple(
        Utterance("self" if (end - at) % 2 == 0 else "partner", text, distractors.get(at, ()))
        for at, text in enumerate(texts)
    )
