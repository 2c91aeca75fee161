"""XPersona, Persona-Chat in other languages: `persona`, and `dialogue` as pairs of the partner's turn and the reply.

The language is in the file's name (`Zh_persona_train_corrected.json`) or in a column `lang` or `language`; it becomes
part of the dialogue's id. Reference: https://github.com/HLTCHKUST/Xpersona.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.data.rows import Row

COLUMNS = [{"persona", "dialogue"}]


def read(file: SourceFile) -> Iterator[RawDialogue]:
    in_name = re.match(r"([A-Z][a-z])_persona_", file.path.name)
    for index, row in enumerate(file.rows()):
        language = row.text("lang" if "lang" in row.values else "language", in_name[1].lower() if in_name else "")
        dialogue_id = "-".join(filter(None, [language, file.dialogue_id(index)]))
        turns: list[RawTurn] = []
        for at, pair in enumerate(row.items("dialogue")):
            place = Row(f"{row.where}, dialogue[{at}]", {"pair": pair})
            texts = place.texts("pair")
            if not 1 <= len(texts) <= 2:
                raise place.unexpected("pair", "the partner's turn and the reply")
            turns.append(RawTurn("partner", texts[0]))
            turns += [RawTurn("self", text) for text in texts[1:]]
        yield RawDialogue(row.where, dialogue_id, row.texts("persona"), tuple(turns), dialogue_id)
