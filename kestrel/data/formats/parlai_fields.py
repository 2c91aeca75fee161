"""ParlAI's "dialog format": `text:...<TAB>labels:...[<TAB>episode_done:True]`, with line breaks written as \\n.

The first text of an episode begins with the personas' lines. Reference: ParlAI's ParlAIDialogTeacher.
"""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.data.formats.parlai import PERSONAS
from kestrel.data.lines import lines_without_ends
from kestrel.data.raw import RawDialogue, RawTurn, SourceFile
from kestrel.errors import KestrelError

COLUMNS: list[set[str]] = []  # lines of fields instead


def matches(start: str) -> bool:
    """Whether a file that starts so has this form."""
    fields = {field.partition(":")[0] for field in start.split("\n", 1)[0].rstrip().split("\t") if ":" in field}
    return "text" in fields and not fields.isdisjoint({"labels", "eval_labels", "episode_done"})


def read(file: SourceFile) -> Iterator[RawDialogue]:
    """A dialogue an episode; of several labels, the first is the reply."""
    personas: dict[str, list[str]] = {kind: [] for kind in PERSONAS}
    turns: list[RawTurn] = []
    where, index = "", 0
    for number, line in lines_without_ends(file.path):
        if not line.strip():
            continue
        place = f"{file.path}:{number}"
        where = where or place
        fields = _fields(line, place)
        said = []
        for text in fields["text"].split("\n"):
            kind = next((kind for kind in PERSONAS if text.startswith(kind)), None)
            if kind and not turns:
                personas[kind].append(text.removeprefix(kind))
            else:
                said.append(text)
        if any(said):
            turns.append(RawTurn("partner", "\n".join(said)))
        if reply := fields.get("labels", fields.get("eval_labels", "")).split("|")[0]:
            wrong = [text for text in fields.get("label_candidates", "").split("|") if text not in ("", reply)]
            turns.append(RawTurn("self", reply, tuple(wrong)))
        if fields.get("episode_done") == "True":
            yield from file.sides(_dialogue(file, index, where, personas, turns))
            personas, turns = {kind: [] for kind in PERSONAS}, []
            where, index = "", index + 1
    if turns:
        yield from file.sides(_dialogue(file, index, where, personas, turns))


def _fields(line: str, place: str) -> dict[str, str]:
    fields = dict(field.partition(":")[::2] for field in line.split("\t"))
    if "text" not in fields:
        raise KestrelError(f"{place}: expected 'text:...<TAB>labels:...', found {line[:60]!r}.")
    return {key: value.replace("\\n", "\n") for key, value in fields.items()}


def _dialogue(
    file: SourceFile, index: int, where: str, personas: dict[str, list[str]], turns: list[RawTurn]
) -> RawDialogue:
    own, partners = map(tuple, personas.values())
    return RawDialogue(where, file.dialogue_id(index), own, tuple(turns), file.dialogue_id(index), partners)
