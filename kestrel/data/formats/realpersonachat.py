"""RealPersonaChat: a dialogue a file (`dialogues/00001.json`); the personas are in `interlocutors.json` above the folder.

Reference: Yamashita et al. 2023, https://github.com/nu-dialogue/real-persona-chat.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row
from kestrel.errors import KestrelError

COLUMNS = [{"interlocutors", "utterances"}]

_PERSONAS = "interlocutors.json"


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """Each conversation from the side of its second interlocutor, then of its first where `data.both_sides`."""
    personas = _personas(file.path)
    for index, row in enumerate(file.rows()):
        names = row.texts("interlocutors")
        if len(names) != 2 or not set(names) <= personas.values.keys():
            raise row.unexpected("interlocutors", f"two names that are in {_PERSONAS}")
        one, two = (personas.object(name).texts("persona") for name in names)
        turns = tuple(
            RawTurn("self" if turn.text("interlocutor_id") == names[1] else "partner", turn.text("text"))
            for turn in row.objects("utterances")
        )
        dialogue_id = row.identifier("dialogue_id") if "dialogue_id" in row.values else file.dialogue_id(index)
        yield from file.sides(RawDialogue(row.where, dialogue_id, two, turns, dialogue_id, one))


def _personas(path: Path) -> Row:
    for folder in (path.parent, path.parent.parent):
        if (folder / _PERSONAS).is_file():
            return Row(str(folder / _PERSONAS), _content(folder / _PERSONAS))
    raise KestrelError(
        f"{path}: the personas of RealPersonaChat are in another file; put {_PERSONAS} of the corpus into the same "
        "folder or the one above it."
    )


@lru_cache(1)
def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise KestrelError(f"{path}: not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise KestrelError(f"{path}: expected an object with a key for each interlocutor.")
    return content
