"""Dialogues as people have them: messengers' exports in many forms, chat messages in every spelling, packed and broken."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_corpora import EXPORTS, INTERLOCUTORS, LAYOUTS, SAID, TURNS, openai, read, write

from kestrel.data import chat_log
from kestrel.data.formats import messages
from kestrel.dialogue import Turn
from kestrel.errors import KestrelError

# How phones in many languages write the time; `{}` is what follows it.
STAMPS = [
    "20/6/2017 8:28 p. m. - {}", "1/14/23, 7:02\u202fPM - {}", "[01-29-2018, 23:33:00] {}", "2018/07/28 10:13 - {}",
    "[31/12/2019, 2:14:40 a.m.] {}", "[07.03.26, 21:22:39] {}", "03.08.21, 12:30 - {}", "31.12.2023 klo 22.05 - {}",
    "[2023/12/31 下午10:05:07] {}", "2023. 12. 31. 22:05 - {}", "31/12/2023 à 22:05 - {}", "\u200e[31/12/23, 22:05:07] {}",
    "31.12.23 г., 22:05 ч. - {}", "22:05, 31/12/2023 - {}", "[22:05:07 31/12/2023] {}",
    "[٣١\u200f/١٢\u200f/٢٠٢٣، ١٠:٠٥:٠٧ م] {}",
]  # fmt: skip


@pytest.mark.parametrize("stamp", STAMPS)
def test_whatsapp_in_the_forms_of_many_phones(tmp_path: Path, stamp: str) -> None:
    said = [
        "Messages are encrypted.",
        "Ben: at 18:02: here?",
        "Ana:  ten minutes\nstill: looking",
        "Ben left",
        "Ben: ok",
    ]
    source = write(tmp_path, "".join(stamp.format(text) + "\r\n" for text in said).encode("utf-8-sig"))
    (dialogue,), counts = read(source, **EXPORTS)
    assert dialogue.turns == (Turn("partner", "at 18:02: here?"), Turn("self", "ten minutes\nstill: looking"))
    assert counts.repaired[chat_log.SYSTEM] == 2


def test_whatsapp_leaves_out_what_nobody_wrote(tmp_path: Path) -> None:
    texts = ["<Medien ausgeschlossen>", "\u200eimage omitted", "IMG-1.jpg (Datei angehängt)", "\u200e<attached: 1.jpg>"]
    deleted = ["This message was deleted", "\u200eDiese Nachricht wurde gelöscht."]
    kept = [
        "IMG-1.jpg (file attached)\nthe hive",
        "see \u200e<attached: 1.jpg>",
        "new \u200e<This message was edited>",
        "<3",
    ]
    lines = [f"01.02.24, 10:05 - Ana: {text}\n" for text in texts + deleted + kept]
    (dialogue,), counts = read(write(tmp_path, "".join(lines)), **EXPORTS)
    assert dialogue.turns == (Turn("self", "the hive see new <3"),)
    assert counts.repaired[chat_log.MEDIA] == 6 and counts.repaired[chat_log.DELETED] == 2


def test_days_and_months_are_told_apart_by_the_whole_file(tmp_path: Path) -> None:
    """Sessions of three days in a row; as months they would be the same days of three months, or not exist."""
    for days in (
        ["11/12/24", "12/12/24", "13/12/24"],
        ["12/11/24", "12/12/24", "12/13/24"],
        ["24/12/11", "24/12/12", "24/12/13"],
    ):
        lines = [f"{day}, 10:0{at} - {name}: {day}\n" for day in days for at, name in enumerate(("Ben", "Ana"))]
        dialogues, _ = read(write(tmp_path, "".join(lines)), **EXPORTS | {"session_gap": 23.0})
        assert len(dialogues) == 3
        assert len(read(write(tmp_path, "".join(lines)), **EXPORTS | {"session_gap": 24.0})[0]) == 1
    with pytest.raises(KestrelError, match="no order of day, month and year"):
        read(write(tmp_path, "13/13/24, 10:00 - Ana: a\n"), **EXPORTS)
    with pytest.raises(KestrelError, match="x:1: '25:00' is no time of day"):
        read(write(tmp_path, "13/12/24, 25:00 - Ana: a\n"), **EXPORTS)


@pytest.mark.parametrize("format", ["whatsapp", "telegram", "discord", "messenger"])
def test_the_one_who_is_learned_must_be_named(tmp_path: Path, format: str) -> None:
    source = write(tmp_path, LAYOUTS[format])
    for name, message in (
        (None, "a messenger's export; set data.self"),
        ("Anna", "nobody is called 'Anna'; set data.self"),
    ):
        with pytest.raises(KestrelError, match=rf"{message} .*'Ben' \(3\), 'Ana' \(3\)"):
            read(source, **EXPORTS | {"self": name})
    with pytest.raises(KestrelError, match="no persona; data.persona can give one"):
        read(source, **EXPORTS | {"persona": []})


def test_a_chat_without_an_answer_is_no_wrong_name(tmp_path: Path) -> None:
    for name, text in (("a", "Cem"), ("b", "Ana"), ("c", "Ben")):
        write(tmp_path, f"01.02.24, 10:05 - {text}: hi\n", f"{name}.txt")
    (dialogue,), counts = read(str(tmp_path), **EXPORTS)
    assert dialogue.turns == (Turn("self", "hi"),) and counts.dropped == {"no reply by the persona's owner": 2}
    said = "files in which nobody is called 'Ana' (data.self)"
    assert counts.repaired == {said: 2} and counts.first[said].endswith("a.txt")
    for name, message in (("Anna", "'Cem' .1., 'Ana' .1., 'Ben' .1."), (None, "'Cem' .1.")):
        place = tmp_path if name else tmp_path / "a.txt"
        with pytest.raises(KestrelError, match=rf"^{place}: .*set data.self to .*: {message}\."):
            read(str(tmp_path), **EXPORTS | {"self": name})


def test_an_account_of_telegram_is_cut_by_chat_and_by_silence(tmp_path: Path) -> None:
    def said(name: str | None, time: str, text: Any = "hi", **more: Any) -> dict[str, Any]:
        return {"type": "message", "date": f"2024-07-05T{time}:00", "from": name, "text": text} | more

    first = [
        said("Ben", "10:00"),
        said("Ana", "10:01", ["see ", {"type": "link", "text": "a"}]),
        said("Ben", "18:00"),
        said("Ana", "18:01"),
    ]
    noise = [
        said("Ana", "18:02", "", photo="x"),
        said("Ana", "18:03", forwarded_from="C"),
        {"type": "service", "text": ""},
    ]
    chats = [{"messages": first + noise}, {"messages": [said(None, "18:02"), said("Ana", "18:03")]}]
    dialogues, counts = read(write(tmp_path, json.dumps({"chats": {"list": chats}})), **EXPORTS | {"session_gap": 6.0})
    assert [len(dialogue.turns) for dialogue in dialogues] == [2, 2, 2] and dialogues[0].turns[1].text == "see a"
    assert [counts.repaired[each] for each in (chat_log.MEDIA, chat_log.FORWARDED, chat_log.SYSTEM)] == [1, 1, 1]


def test_discord_knows_two_names_and_messenger_its_own_letters(tmp_path: Path) -> None:
    def said(text: str, **author: Any) -> dict[str, Any]:
        return {"type": "Reply", "timestamp": "2024-07-05T10:00:00.5Z", "content": text, "author": author}

    log = [
        said("a", name="ben"),
        said("beep", name="b", isBot=True),
        said("b", name="ana", nickname="Ana B"),
        said("", name="ben"),
    ]
    source = write(tmp_path, json.dumps({"guild": {}, "channel": {}, "messages": log}))
    for name in ("ana", "Ana B"):
        assert len(read(source, **EXPORTS | {"self": name})[0][0].turns) == 2
    log = [
        {"sender_name": "Ana", "timestamp_ms": at, "content": text} for at, text in ((9, "caf\u00c3\u00a9"), (8, "€"))
    ]
    (dialogue,), _ = read(write(tmp_path, json.dumps({"participants": [], "messages": log})), **EXPORTS)
    assert dialogue.turns == (Turn("self", "€ café"),)


SYSTEM = {"role": "system", "content": "You are A.\n\nYou keep bees."}
SHAREGPT = [
    {"from": "system", "value": SYSTEM["content"]},
    *({"from": {"user": "Human", "assistant": "GPT"}[each["role"]], "value": each["content"]} for each in openai()),
]
PARTS = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in [SYSTEM, *openai()]]

NAMED = [
    {"from": "Mira", "role_type": "bot" if turn.speaker == "self" else "user", "value": turn.text} for turn in TURNS
]
PAIRS = [{"human": SAID[at], "assistant": SAID[at + 1]} for at in range(0, 6, 2)]


@pytest.mark.parametrize(
    "content",
    [
        {"messages": [SYSTEM, *openai()]},
        [{"messages": [SYSTEM, *openai()]}],
        [[SYSTEM, *openai()]],
        {"conversations": SHAREGPT},
        {"conversation": PARTS},
        {"system": SYSTEM["content"], "conversations": SHAREGPT[1:]},
        {"persona": [SYSTEM["content"]], "messages": openai()},
        {"train": [{"messages": [SYSTEM, *openai()], "tools": None}]},
        {"system": {"from": "system", "value": SYSTEM["content"]}, "conversation": NAMED},
        {"system": SYSTEM["content"], "conversation": PAIRS},
        {"system": SYSTEM["content"], "conversations": SAID},
    ],
)
def test_chat_messages_in_every_spelling(tmp_path: Path, content: Any) -> None:
    tables = [content] if isinstance(content, dict) and "train" not in content else []
    for record in tables:
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "data.parquet")
        out = io.StringIO()
        csv.writer(out, delimiter=";").writerows([list(record), [json.dumps(value) for value in record.values()]])
        if "system" not in record and "persona" not in record:
            assert read(write(tmp_path, out.getvalue()))[0][0].turns == TURNS
        assert read(str(tmp_path / "data.parquet"))[0][0].turns == TURNS
    for indent in (None, 2):
        (dialogue,), counts = read(write(tmp_path, json.dumps(content, indent=indent)))
        assert dialogue.turns == TURNS and dialogue.persona == (SYSTEM["content"],)
        assert not counts.repaired and not counts.dropped


def test_messages_that_cannot_be_learned_are_counted_with_their_place(tmp_path: Path) -> None:
    bad = [
        ({"role": "tool", "content": "x"}, messages.TOOLS),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, messages.TOOLS),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, messages.NOT_TEXT),
        ({"role": "moderator", "content": "x"}, messages.UNKNOWN_ROLE),
        ({"role": "user"}, messages.UNFIT),
    ]
    rows = [
        {"messages": [SYSTEM, *openai()]},
        *({"messages": [*openai(), message]} for message, _ in bad),
        {"text": "a"},
    ]
    _, counts = read(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert counts.dropped == {messages.TOOLS: 2, messages.NOT_TEXT: 1, messages.UNKNOWN_ROLE: 1, messages.UNFIT: 2}
    assert counts.first[messages.UNKNOWN_ROLE].endswith("data.x:5, messages[6], by 'moderator'")
    unwanted = [SYSTEM, *openai()[:1], {**openai()[1], "weight": 0}]
    _, counts = read(write(tmp_path, json.dumps({"messages": unwanted})))
    assert counts.repaired == {"replies learned although their weight is 0": 1}
    with pytest.raises(KestrelError, match="yields no dialogue .*it calls tools"):
        read(write(tmp_path, json.dumps(rows[1])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}], "instructions in Alpaca's form"),
        ({"instruction,output": "User: a"}, "instructions in Alpaca's form"),
        ({"prompt": "a", "completion": "b"}, "pairs of prompt and completion"),
        ({"chosen": [], "rejected": []}, "preferences"),
        (openai(), "one conversation as a list"),
        ({"title": "x", "mapping": {}}, "export of ChatGPT"),
        ({"text": "<|im_start|>user"}, "a text for each row"),
    ],
)
def test_what_is_no_dialogue_is_refused_by_its_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(KestrelError, match=message):
        read(write(tmp_path, json.dumps(content)))


def test_archives_with_anything_else_are_refused_by_name(tmp_path: Path) -> None:
    for names, message in (
        (["a.txt", "b.json"], "one data file .* found a.txt, b.json"),
        (["xl/workbook.xml"], "a spreadsheet; save its sheet as CSV"),
        (["a.jpg"], "found a.jpg"),
    ):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in names:
                archive.writestr(name, "x")
        with pytest.raises(KestrelError, match=message):
            read(str(tmp_path / "x.zip"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[6] |= 1  # the mark of a file with a password: before the file, and in the archive's directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(KestrelError, match="x.zip: cannot be read: the archive has a password; unpack it"):
        read(str(tmp_path / "x.zip"))


def test_redaction_replaces_and_counts(tmp_path: Path) -> None:
    said = "mail a.b@c.example.org or +49 (151) 2345-6789, see https://x.example/y?z=1 on 2024-12-31, 3.14159 or 12345"
    record = {"persona": ["call 0151 23456789"], "turns": [{"speaker": "self", "text": said}]}
    source = write(tmp_path, json.dumps(record))
    (dialogue,), counts = read(source, redact=["email", "phone", "url"])
    assert dialogue.turns[0].text == "mail [email] or [phone], see [url] on 2024-12-31, 3.14159 or 12345"
    assert dialogue.persona == ("call [phone]",) and sum(counts.repaired.values()) == 4
    assert read(source)[0][0].turns[0].text == said


def test_sessions_of_msc_share_a_split_and_earlier_ones_are_a_setting(tmp_path: Path) -> None:
    earlier = [{"dialog": [{"text": "first"}, {"text": "second"}]}]
    row = json.loads(LAYOUTS["msc"]) | {"previous_dialogs": earlier, "metadata": {"initial_data_id": "valid_0"}}
    for turn, name in zip(row["dialog"], ["bot_0", "bot_1"] * 3, strict=True):
        turn["id"] = name
    source = write(tmp_path, json.dumps(row) + "\n" + json.dumps(row))
    dialogues, counts = read(source)
    assert {dialogue.conversation_id for dialogue in dialogues} == {"valid_0"} and len(dialogues) == 4
    assert counts.repaired["earlier sessions left out (data.earlier_sessions)"] == 2
    (dialogue, *_), _ = read(source, earlier_sessions=True)
    assert [turn.text for turn in dialogue.turns] == ["first", "second", *SAID] and dialogue.turns[2:] == TURNS


def test_realpersonachat_is_a_folder(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "dialogues", LAYOUTS["realpersonachat"], f"{number:05}.json")
    (tmp_path / "dialogues" / "interlocutors.json").unlink()
    with pytest.raises(KestrelError, match="put interlocutors.json of the corpus into"):
        read(str(tmp_path))
    write(tmp_path, json.dumps(INTERLOCUTORS), "interlocutors.json")
    assert len(read(str(tmp_path))[0]) == 6
