"""Hugging Face's JSON of ConvAI2 and the hub set AlekseyKorshuk/persona-chat: a dialogue a row, a history a reply.

`personality` is the owner's persona; each of `utterances` has the full `history` before a reply and its `candidates`,
the gold reply last. Reference: https://github.com/huggingface/transfer-learning-conv-ai.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.read_counts import ReadCounts
from kestrel.data.repair import normalized
from kestrel.data.rows import Row
from kestrel.errors import KestrelError

COLUMNS = [{"personality", "utterances"}]


def read(file: SourceFile) -> Iterator[RawDialogue]:
    for index, row in enumerate(file.rows()):
        turns = turns_of_steps(row.objects("utterances"), row.where, file.counts)
        if turns is not None:
            yield RawDialogue(row.where, file.dialogue_id(index), row.texts("personality"), turns)


def turns_of_steps(steps: Sequence[Row], where: str, counts: ReadCounts) -> tuple[RawTurn, ...] | None:
    """The turns of one conversation from rows that each hold `history` and `candidates`, the gold reply last.

    The longest history is the conversation. Each reply must be in it where its own history ends; otherwise the rows
    contradict each other, the dialogue is counted as dropped, and the result is None.
    """
    if not steps:
        return ()
    offers = [(step.texts("history"), step.texts("candidates")) for step in steps]
    for step, (_, candidates) in zip(steps, offers, strict=True):
        if not candidates:
            raise KestrelError(f"{step.where}: 'candidates' is empty; its last entry must be the gold reply.")
    longest, candidates = max(offers, key=lambda offer: len(offer[0]))
    texts = [*longest, candidates[-1]]
    distractors: dict[int, tuple[str, ...]] = {}
    for history, candidates in offers:
        at = len(history)
        expected = texts[max(at - 1, 0) : at + 1]
        if list(map(normalized, (*history[-1:], candidates[-1]))) != list(map(normalized, expected)):
            counts.skip("histories of its rows contradict each other", where)
            return None
        texts[at] = candidates[-1]
        distractors[at] = candidates[:-1]
    end = len(texts) - 1
    return tuple(
        RawTurn("self" if (end - at) % 2 == 0 else "partner", text, distractors.get(at, ()))
        for at, text in enumerate(texts)
    )
