"""Readers of every format: what they find in miniature files in the published layouts."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_corpora import (
    CYNAPTICS,
    DISTRACTORS,
    EXPORTS,
    LAYOUTS,
    MESSENGERS,
    PARTNER,
    PERSONA,
    SAID,
    TURNS,
    parlai,
    read,
    spc,
    steps,
    table,
    tagged,
    write,
)  # fmt: skip

from kestrel.config.settings import Data
from kestrel.data.corpus import open_corpus
from kestrel.dialogue import Turn
from kestrel.errors import KestrelError


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("dressing", ["plain", "bom", "crlf", "utf-16", "gzip", "zip"])
def test_the_same_dialogue_from_every_format(tmp_path: Path, format: str, dressing: str) -> None:
    content = LAYOUTS[format].encode()
    write(tmp_path, content, "whole")  # with what lies beside it
    if dressing == "bom":
        content = b"\xef\xbb\xbf" + content
    if dressing == "crlf":
        content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    if dressing == "utf-16":
        content = content.decode().encode("utf-16")
    if dressing == "gzip":
        content = gzip.compress(content)
    source = write(tmp_path, content)
    if dressing == "zip":
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.writestr("folder/data.txt", content)
            archive.writestr("folder/IMG-1.jpg", b"\xff")
        source = str(tmp_path / "all.zip")
    assert open_corpus(Data(source=source)).format == format
    choices = EXPORTS if format in MESSENGERS else {}
    dialogues, counts = read(source, both_sides=False, **choices)
    assert [dialogue.turns for dialogue in dialogues] == [TURNS]
    assert dialogues[0].persona == tuple(PERSONA)
    offers = {"parlai", "parlai_fields", "huggingface", "truecased", "kestrel"}
    only_last = ((), (), tuple(DISTRACTORS[2])) if format == "dnli" else ()
    assert dialogues[0].candidates == (tuple(map(tuple, DISTRACTORS)) if format in offers else only_last)
    assert not counts.dropped
    assert not counts.repaired


@pytest.mark.parametrize("format", ["huggingface", "truecased", "cynaptics", "synthetic"])
def test_parquet_as_the_hub_serves_it(tmp_path: Path, format: str) -> None:
    records = {
        "huggingface": [{"personality": PERSONA, "utterances": steps()}],
        "truecased": [{"personality": PERSONA, "conv_id": 3, **step} for step in steps()],
        "cynaptics": [CYNAPTICS],
        "synthetic": [spc(tagged())],
    }
    pq.write_table(pa.Table.from_pylist(records[format]), tmp_path / "data.parquet")
    dialogues, _ = read(str(tmp_path / "data.parquet"), both_sides=False)
    assert [dialogue.turns for dialogue in dialogues] == [TURNS]


@pytest.mark.parametrize("kind", ["self", "other", "both", "none"])
def test_parlai_personas(tmp_path: Path, kind: str) -> None:
    dialogues, _ = read(write(tmp_path, parlai(kind)))
    assert dialogues[0].persona == (tuple(PERSONA) if kind in ("self", "both") else ())
    assert dialogues[0].partner_persona == (tuple(PARTNER) if kind in ("other", "both") else ())
    assert len(dialogues) == (2 if kind == "both" else 1)
    if kind == "both":
        other = dialogues[1]
        assert (other.persona, other.partner_persona) == (tuple(PARTNER), tuple(PERSONA))
        assert other.conversation_id == dialogues[0].conversation_id
        assert [turn.text for turn in other.turns] == SAID[:-1]
        assert other.turns[0].speaker == "self"


def test_parlai_adds_no_side_that_the_file_holds_already(tmp_path: Path) -> None:
    said = [f"utterance {number}" for number in range(10)]
    first = "".join(f"{at // 2 + 3} {said[at]}\t{said[at + 1]}\n" for at in range(0, 10, 2))
    mirror = ["__ SILENCE __", *said[:9]]
    second = "".join(f"{at // 2 + 3} {mirror[at]}\t{mirror[at + 1]}\n" for at in range(0, 10, 2))
    mine, yours = "1 your persona: a\n2 partner's persona: b\n", "1 your persona: b\n2 partner's persona: a\n"
    dialogues, _ = read(write(tmp_path, mine + first + yours + second))
    assert [dialogue.persona for dialogue in dialogues] == [("a",), ("b",)]
    assert len({dialogue.conversation_id for dialogue in dialogues}) == 1
    assert dialogues[1].turns[0] == Turn("self", said[0])


def test_hub_json_has_its_own_splits(tmp_path: Path) -> None:
    rows = [{"personality": PERSONA, "utterances": steps()}]
    source = write(tmp_path, json.dumps({"train": rows * 3, "valid": rows}, indent=1))
    assert open_corpus(Data(source=source)).splits == ("train", "validation")
    assert [len(read(source, split=split)[0]) for split in ("train", "validation")] == [3, 1]
    assert open_corpus(Data(source=write(tmp_path, json.dumps({"valid": rows * 3})))).splits == ("train",)
    for keys, says in ((("valid", "test"), "no train split"), (("train", "valid", "dev"), "are one split")):
        with pytest.raises(KestrelError, match=says):
            open_corpus(Data(source=write(tmp_path, json.dumps(dict.fromkeys(keys, rows)))))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("Valentina Ben Devin Tester Valérie VALERIE", "train:6"),
        ("train-00000-of-00001 valid_self_original testset", "train:1 validation:1 test:1"),
        ("training validation testing", "train:1 validation:1 test:1"),
        ("x_train dev2", "train:1 validation:1"),
        ("Chat_with_Train_crew val-1 Ben Zoe", "train:1 validation:1"),
    ],
)
def test_the_split_is_a_word_of_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str, splits: str
) -> None:
    for name in names.split():
        write(tmp_path, LAYOUTS["kestrel"], f"{name}.jsonl")
    found = open_corpus(Data(source=str(tmp_path))).files
    assert " ".join(f"{split}:{len(files)}" for split, files in found.items()) == splits
    said = "name no split are left out (2, such as Ben.jsonl), for Chat_with_Train_crew.jsonl is taken as the train"
    assert (said in capsys.readouterr().err) == ("Zoe" in names)
    write(tmp_path / "people", LAYOUTS["kestrel"], "Dev Patel.jsonl")
    with pytest.raises(KestrelError, match=r"no train split.*; Dev Patel.jsonl is taken as the validation split\."):
        open_corpus(Data(source=str(tmp_path / "people")))


def test_histories_that_contradict_each_other_drop_the_dialogue(tmp_path: Path) -> None:
    bad = steps()
    bad[0]["candidates"] = ["another gold reply"]
    rows = [{"personality": PERSONA, "utterances": turns} for turns in (bad, steps())]
    dialogues, counts = read(write(tmp_path, json.dumps({"train": rows})))
    assert len(dialogues) == 1
    assert counts.dropped == {"histories of its rows contradict each other": 1}


def test_a_history_that_begins_with_the_owner(tmp_path: Path) -> None:
    utterances = [{"candidates": ["no", "c"], "history": ["a", "b"]}]
    dialogues, _ = read(write(tmp_path, json.dumps({"train": [{"personality": PERSONA, "utterances": utterances}]})))
    assert dialogues[0].turns == (Turn("self", "a"), Turn("partner", "b"), Turn("self", "c"))
    assert dialogues[0].candidates == ((), ("no",))


def test_cynaptics_keeps_the_longest_row_of_a_conversation(tmp_path: Path) -> None:
    short = CYNAPTICS | {"dialogue": CYNAPTICS["dialogue"][:3], "reference": SAID[3]}
    dialogues, counts = read(write(tmp_path, "\n".join(json.dumps(row) for row in (short, CYNAPTICS, short))))
    assert [dialogue.turns for dialogue in dialogues] == [TURNS]
    assert counts.repaired == {"rows left out: a longer row holds the same conversation": 2}


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ("User 1: Hi, I'm [user 1's name].\nUser 2: Hello! I'm (name).\nUser 1: A?\nUser 2: B.", "Hi!|Hello!|A?|B."),
        ("User 1: A.\nUser 2: Nice to meet you, [user 1 name]. B?", "A.|Nice to meet you. B?"),
        ("User 1: A.\nUser 2: B. Your name?\nUser 1: I'm User 1.\nUser 2: C.", "A.|C."),
        ("*User 1:* A.\n\n*User 2:* B.", "A.|B."),
        ("* User 1: A. *\n* User 2: B! *", "A.|B!"),
        ("* * *\nUser 1: A.\n[Later]\nAt the gym\nAdam: hi\nUser 2: B.", "A.|B."),
        ("User 1: A.\nUser 2: Here it is:\n\nTea\nMilk\n\nUser 1: C.\nUser 2: D.", "A.|Here it is: Tea Milk|C.|D."),
        ("User 1: A.\nUser 1: B.\nUser 2: C.", "A. B.|C."),
        ("user1: A (really).\nUSER 2 : B <3", "A (really).|B <3"),
    ],
)
def test_synthetic_mess(tmp_path: Path, conversation: str, expected: str) -> None:
    filler = spc("User 1: X.\nUser 2: Y.")
    dialogues, _ = read(write(tmp_path, table(spc(conversation), filler)), both_sides=True)
    first = [each for each in dialogues if each.dialogue_id.startswith("train-000000")]
    longest = max((each.turns for each in first), key=len)
    assert "|".join(turn.text for turn in longest) == expected


def test_synthetic_rows_without_turns_are_counted_for_both_owners(tmp_path: Path) -> None:
    dialogues, counts = read(write(tmp_path, table(spc("No conversation was made."), spc(tagged()))))
    assert len(dialogues) == 2
    assert counts.dropped == {"no reply by the persona's owner": 2}
    assert {dialogue.conversation_id for dialogue in dialogues} == {"train-000001"}


def test_repairs_are_counted(tmp_path: Path) -> None:
    turns = [
        {"speaker": "partner", "text": " hi\nthere "},
        {"speaker": "self", "text": "a\0b"},
        {"speaker": "self", "text": "  "},
        {"speaker": "partner", "text": "x"},
        {"speaker": "partner", "text": "y"},
        {"speaker": "self", "text": "gold \ud800"},
        {"speaker": "partner", "text": "bye"},
    ]
    record = {"persona": ["p", ""], "turns": turns, "candidates": [["q"], [], ["gold", "r"]]}
    dialogues, counts = read(write(tmp_path, json.dumps(record)))
    assert [turn.text for turn in dialogues[0].turns] == ["hi\nthere", "ab", "x y", "gold"]
    assert dialogues[0].candidates == (("q",), ("r",))
    assert counts.repaired == {
        "texts freed of control characters or broken surrogates": 2,
        "turns removed: empty": 1,
        "turns merged into the turn before: the same speaker": 1,
        "turns removed: by the partner after the last reply": 1,
        "persona sentences removed: empty": 1,
        "candidates removed: the gold reply among the distractors": 1,
    }
    assert "data.x:1" in counts.table()


def test_a_very_long_turn_passes(tmp_path: Path) -> None:
    for format in ("parlai", "kestrel", "synthetic"):
        long = LAYOUTS[format].replace(SAID[3], "word " * 30_000 + "end")
        dialogues, _ = read(write(tmp_path, long), both_sides=False)
        assert len(dialogues[0].turns[3].text) > 100_000


def test_folder_of_native_splits(tmp_path: Path) -> None:
    for name in ("train_self_original.txt", "valid_self_original.txt"):
        write(tmp_path, parlai("self"), name)
    corpus = open_corpus(Data(source=str(tmp_path)))
    assert corpus.splits == ("train", "validation")
    assert set(corpus.fingerprint) == {path.name for path in corpus.paths}
    write(tmp_path, parlai("both"), "train_both_original.txt")
    with pytest.raises(KestrelError, match="several files could be the train split"):
        open_corpus(Data(source=str(tmp_path)))
