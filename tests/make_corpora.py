"""The same dialogue in every published layout, and what each reading of it must hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from kestrel.config.settings import Data
from kestrel.data.corpus import open_corpus
from kestrel.data.read_counts import ReadCounts
from kestrel.data.reading import Reading, require_unique_ids
from kestrel.dialogue import Dialogue, Turn

PERSONA = ["i like tea .", "i have two dogs ."]
PARTNER = ["i am a pilot ."]
SAID = ["hi !", "hello , how are you ?", "fine . you ?", "walking my dogs .", "i fly planes .", "wow , high tea !"]
DISTRACTORS = [["no .", "yes ."], ["cats .", "who ?"], ["never .", "bye ."]]
OFFERS = [[*distractors, gold] for distractors, gold in zip(DISTRACTORS, SAID[1::2], strict=True)]
TURNS = tuple(Turn("self" if at % 2 else "partner", text) for at, text in enumerate(SAID))


def parlai(kind: str, *, candidates: bool = False, said: list[str] = SAID) -> str:
    lines = [f"your persona: {text}" for text in PERSONA] if kind in ("self", "both") else []
    lines += [f"partner's persona: {text}" for text in PARTNER] if kind in ("other", "both") else []
    for at in range(0, len(said), 2):
        offer = "\t\t" + "|".join([*DISTRACTORS[at // 2], said[at + 1]]) if candidates else ""
        lines.append(f"{said[at]}\t{said[at + 1]}{offer}")
    return "".join(f"{number} {line}\n" for number, line in enumerate(lines, 1))


def table(*records: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, records[0])
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def steps() -> list[dict[str, Any]]:
    return [{"candidates": offer, "history": SAID[: 2 * at + 1]} for at, offer in enumerate(OFFERS)]


def spc(conversation: str) -> dict[str, str]:
    return {
        "user 1 personas": "\n".join(PARTNER),
        "user 2 personas": "\n".join(PERSONA),
        "Best Generated Conversation": conversation,
    }


def tagged() -> str:
    return "\n".join(f"User {at % 2 + 1}: {text}" for at, text in enumerate(SAID))


SPOKEN = [(at, "Ana" if at % 2 else "Ben", text) for at, text in enumerate(SAID)]


def fields() -> str:
    texts = ["\\n".join([*(f"your persona: {text}" for text in PERSONA), SAID[0]]), *SAID[2::2]]
    pairs = zip(texts, SAID[1::2], DISTRACTORS, strict=True)
    lines = [f"text:{text}\tlabels:{reply}\tlabel_candidates:{'|'.join(wrong)}" for text, reply, wrong in pairs]
    return "id:convai2\t" + "\n".join(lines) + "\tepisode_done:True\n"


def openai() -> list[dict[str, str]]:
    return [{"role": "assistant" if turn.speaker == "self" else "user", "content": turn.text} for turn in TURNS]


def dnli() -> str:
    candidates = {"label": [SAID[5]], "neg": DISTRACTORS[2][:1], "rand": DISTRACTORS[2][1:]}
    return json.dumps({"persona": PERSONA, "prefix": SAID[:5], "candidates": candidates})


def wild() -> list[dict[str, str]]:
    return [
        {"sender": name, "sender_class": "Human" if name == "Ana" else "Bot", "text": text} for _, name, text in SPOKEN
    ]


def utterances() -> list[dict[str, str]]:
    return [{"interlocutor_id": "AB" if name == "Ana" else "AA", "text": text} for _, name, text in SPOKEN]


def telegram() -> list[dict[str, Any]]:
    return [
        {"type": "message", "date": f"2024-07-05T16:0{at}:00", "from": name, "text": [text[:2], {"text": text[2:]}]}
        for at, name, text in SPOKEN
    ]


def discord() -> list[dict[str, Any]]:
    return [
        {"type": "Default", "timestamp": f"2024-07-05T16:0{at}:00.5+00:00", "content": text, "author": {"name": name}}
        for at, name, text in SPOKEN
    ]


def messenger() -> list[dict[str, Any]]:
    return [{"sender_name": name, "timestamp_ms": 10**12 + at, "content": text} for at, name, text in SPOKEN]


CYNAPTICS = {
    "conv_id": "7",
    "persona_b": PERSONA,
    "dialogue": [f"Persona {'AB'[at % 2]}: {text}" for at, text in enumerate(SAID[:5])],
    "reference": SAID[5],
}
OWN = {"persona": PERSONA, "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in TURNS]}
LAYOUTS = {
    "parlai": parlai("self", candidates=True),
    "huggingface": json.dumps({"train": [{"personality": PERSONA, "utterances": steps()}]}),
    "truecased": "".join(json.dumps({"personality": PERSONA, "conv_id": 3, **step}) + "\n" for step in steps()),
    "cynaptics": json.dumps(CYNAPTICS),
    "synthetic": table(spc(tagged())),
    "kaggle": table({"": 0, "Persona": ". ".join(PERSONA), "chat": "\n".join(SAID) + "\n"}),
    "kestrel": json.dumps(OWN | {"candidates": DISTRACTORS}),
    "parlai_fields": fields(),
    "messages": json.dumps({"messages": [{"role": "system", "content": text} for text in PERSONA] + openai()}),
    "xpersona": json.dumps([{"persona": PERSONA, "dialogue": [list(SAID[at : at + 2]) for at in range(0, 6, 2)]}]),
    "msc": json.dumps({"personas": [PARTNER, PERSONA], "dialog": [{"text": text} for text in SAID]}),
    "dnli": dnli(),
    "wild": json.dumps([{"user_profile": PERSONA, "bot_profile": PARTNER, "dialog": wild()}]),
    "realpersonachat": json.dumps({"interlocutors": ["AA", "AB"], "utterances": utterances()}),
    "whatsapp": "".join(f"[{24 + at}.12.24, 0{at}:10:07] {name}: {text}\n" for at, name, text in SPOKEN),
    "telegram": json.dumps({"name": "Ben", "type": "personal_chat", "id": 1, "messages": telegram()}, indent=1),
    "discord": json.dumps({"guild": {}, "channel": {}, "messages": discord()}),
    "messenger": json.dumps({"participants": [], "messages": messenger()[::-1]}),
}
INTERLOCUTORS = {"AA": {"persona": PARTNER}, "AB": {"persona": PERSONA}}  # RealPersonaChat's other file
MESSENGERS = ("whatsapp", "telegram", "discord", "messenger")
# What a messenger's export needs; readers of other formats take their own persona.
EXPORTS: dict[str, Any] = {"self": "Ana", "persona": PERSONA, "session_gap": 30.0}


def write(folder: Path, content: str | bytes, name: str = "data.x") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if "interlocutors" in str(content):
        (folder / "interlocutors.json").write_text(json.dumps(INTERLOCUTORS))
    return str(path)


def read(
    source: str, format: str = "auto", split: str = "train", both_sides: bool = True, **choices: Any
) -> tuple[list[Dialogue], ReadCounts]:
    reading = Reading(open_corpus(Data(source=source, format=format, both_sides=both_sides, **choices)), split)
    dialogues, counts = [], ReadCounts()
    require_unique_ids([reading])
    for dialogue, counted, _ in reading.dialogues():
        dialogues.append(dialogue)
        counts.add(counted)
    counts.add(reading.rest)
    check(dialogues, counts)
    return dialogues, counts


def check(dialogues: list[Dialogue], counts: ReadCounts) -> None:
    assert counts.kept == len(dialogues)
    assert counts.read == counts.kept + counts.dropped.total()
    assert len({dialogue.dialogue_id for dialogue in dialogues}) == len(dialogues)
    for dialogue in dialogues:
        assert dialogue.conversation_id
        replies = [text for _, text in dialogue.replies()]
        assert dialogue.turns[-1].speaker == "self"
        assert all(one.speaker != other.speaker for one, other in zip(dialogue.turns, dialogue.turns[1:], strict=False))
        assert dialogue.candidates == () or len(dialogue.candidates) == len(replies)
        for distractors, reply in zip(dialogue.candidates, replies, strict=False):
            assert reply not in distractors
        texts = [turn.text for turn in dialogue.turns] + [*dialogue.persona, *dialogue.partner_persona]
        for text in texts + [text for distractors in dialogue.candidates for text in distractors]:
            assert text
            assert text == text.strip()
            assert not set(text) & {"\u2028", *map(chr, range(32))} - {"\n"}
            text.encode("utf-8")
