"""Readers of every format: what they find in miniature files in the published layouts, and what they say of bad ones."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kestrel.corpora import FORMATS, Tally, open_corpus
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError

ROOT = Path(__file__).parents[1]

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
}


def write(folder: Path, content: str | bytes, name: str = "data.x") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(
    source: str, format: str = "auto", split: str = "train", both_sides: bool = True
) -> tuple[list[Dialogue], Tally]:
    tally = Tally()
    dialogues = list(open_corpus(source, format, both_sides=both_sides).read(split, tally))
    check(dialogues, tally)
    return dialogues, tally


def check(dialogues: list[Dialogue], tally: Tally) -> None:
    assert tally.kept == len(dialogues)
    assert tally.read == tally.kept + tally.dropped.total()
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
            assert not set(text) & {"\n", "\t", "\r", "\0", "\u2028"}
            text.encode("utf-8")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dressing", ["plain", "bom", "crlf"])
def test_the_same_dialogue_from_every_format(tmp_path: Path, format: str, dressing: str) -> None:
    content = LAYOUTS[format].encode()
    if dressing == "bom":
        content = b"\xef\xbb\xbf" + content
    if dressing == "crlf":
        content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    source = write(tmp_path, content)
    corpus = open_corpus(source)
    assert corpus.format == format
    dialogues, tally = read(source, both_sides=False)
    assert [dialogue.turns for dialogue in dialogues] == [TURNS]
    assert dialogues[0].persona == tuple(PERSONA)
    expected = tuple(map(tuple, DISTRACTORS)) if format in ("parlai", "huggingface", "truecased", "kestrel") else ()
    assert dialogues[0].candidates == expected
    assert not tally.dropped
    assert not tally.repaired


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


def test_parlai_both_sides_already_told_are_not_told_again(tmp_path: Path) -> None:
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
    assert open_corpus(source).splits == ("train", "validation")
    assert [len(read(source, split=split)[0]) for split in ("train", "validation")] == [3, 1]


def test_histories_that_contradict_each_other_drop_the_dialogue(tmp_path: Path) -> None:
    bad = steps()
    bad[0]["candidates"] = ["another gold reply"]
    rows = [{"personality": PERSONA, "utterances": turns} for turns in (bad, steps())]
    dialogues, tally = read(write(tmp_path, json.dumps({"train": rows})))
    assert len(dialogues) == 1
    assert tally.dropped == {"histories of its rows contradict each other": 1}


def test_a_history_that_begins_with_the_owner(tmp_path: Path) -> None:
    utterances = [{"candidates": ["no", "c"], "history": ["a", "b"]}]
    dialogues, _ = read(write(tmp_path, json.dumps({"train": [{"personality": PERSONA, "utterances": utterances}]})))
    assert dialogues[0].turns == (Turn("self", "a"), Turn("partner", "b"), Turn("self", "c"))
    assert dialogues[0].candidates == ((), ("no",))


def test_cynaptics_keeps_the_longest_row_of_a_conversation(tmp_path: Path) -> None:
    short = CYNAPTICS | {"dialogue": CYNAPTICS["dialogue"][:3], "reference": SAID[3]}
    dialogues, tally = read(write(tmp_path, "\n".join(json.dumps(row) for row in (short, CYNAPTICS, short))))
    assert [dialogue.turns for dialogue in dialogues] == [TURNS]
    assert tally.repaired == {"rows left out: a longer row holds the same conversation": 2}


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
    dialogues, tally = read(write(tmp_path, table(spc("No conversation was made."), spc(tagged()))))
    assert len(dialogues) == 2
    assert tally.dropped == {"no reply by the persona's owner": 2}
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
    dialogues, tally = read(write(tmp_path, json.dumps(record)))
    assert [turn.text for turn in dialogues[0].turns] == ["hi there", "ab", "x y", "gold"]
    assert dialogues[0].candidates == (("q",), ("r",))
    assert tally.repaired == {
        "texts joined: they ran over several lines or held tabs": 1,
        "texts freed of control characters or broken surrogates": 2,
        "turns removed: empty": 1,
        "turns merged into the turn before: the same speaker": 1,
        "turns removed: by the partner after the last reply": 1,
        "persona sentences removed: empty": 1,
        "candidates removed: the gold reply among the distractors": 1,
    }
    assert "data.x:1" in tally.table()


def test_a_very_long_turn_passes(tmp_path: Path) -> None:
    for format in ("parlai", "kestrel", "synthetic"):
        long = LAYOUTS[format].replace(SAID[3], "word " * 30_000 + "end")
        dialogues, _ = read(write(tmp_path, long), both_sides=False)
        assert len(dialogues[0].turns[3].text) > 100_000


def test_folder_of_native_splits(tmp_path: Path) -> None:
    for name in ("train_self_original.txt", "valid_self_original.txt"):
        write(tmp_path, parlai("self"), name)
    corpus = open_corpus(str(tmp_path))
    assert corpus.splits == ("train", "validation")
    assert set(corpus.fingerprint) == {path.name for path in corpus.files}
    write(tmp_path, parlai("both"), "train_both_original.txt")
    with pytest.raises(KestrelError, match="several files could be the train split"):
        open_corpus(str(tmp_path))


OWN_LINE = json.dumps(OWN)
BAD = [
    ("", "is empty"),
    ("\ufeff \n", "is empty"),
    ("<!DOCTYPE html><html></html>", "web page"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    (b"\x1f\x8b\x08\x00", "gzip"),
    ("hi".encode("utf-16"), "UTF-16"),
    (OWN_LINE.encode() + b'\n{"persona": ["caf\xe9"]}', r"data.x:2: byte 18 of the line \(0xe9\)"),
    (parlai("self").encode() + b"1 your persona: caf\xe9\n", r"data.x:6: byte 20 of the line \(0xe9\)"),
    (
        '{"train": [{"personality": ["a"], "utterances": []},\n {"personality": ["\xe9"]}]}'.encode("latin-1"),
        "x:2: byte",
    ),
    (OWN_LINE + "\n" + OWN_LINE[:-9], r"data.x:2: not JSON"),
    (OWN_LINE + "\n[1]", r"data.x:2: one JSON object a line"),
    (LAYOUTS["huggingface"][:-30], "data.x:1"),
    ('{"train": [' + "[" * 10 + "]}", "data.x:1: expected one of {"),
    ('{"persona": ' + "[" * 100_000, "nested too deeply"),
    ('{"train": [{"persona": ' + "[" * 100_000, "nested too deeply"),
    ('{"train": []}', "no rows"),
    (LAYOUTS["parlai"] + "no number\n", r"data.x:6: a ParlAI line is a number"),
    (LAYOUTS["parlai"] + "7 a\tb\n", r"data.x:6: line 7 of a dialogue where 6 should"),
    (LAYOUTS["parlai"] + "6 no reply\n", r"data.x:6: expected 'text<TAB>reply"),
    ("1 your persona: a\r2 b\tc\r", "carriage return"),
    ("a,b\n1,2\n", "of no known format"),
    ("Persona,chat\na\n", r"data.x:2: 1 cells, but the header has 2"),
    ('Persona,chat\na,"b\n', "quotation mark left open"),
    ("Persona,chat\n", "no rows"),
    (json.dumps(OWN | {"Persona": "a", "chat": "b"}), "could be kaggle or kestrel"),
    (json.dumps({"persona": "text", "turns": []}), r"data.x:1: 'persona' must be a list of texts"),
    (json.dumps({"persona": ["a"], "turns": [{"speaker": "me", "text": "a"}]}), r"turns\[0\]: 'speaker' must be"),
    (json.dumps({"persona": ["a"], "turns": [{"speaker": "self"}]}), r"turns\[0\]: 'text' must be a text"),
    (json.dumps(OWN | {"candidates": [["a"]]}), "one list for each of 3 replies"),
    (json.dumps(OWN | {"dialogue_id": "d"}) + "\n" + json.dumps(OWN | {"dialogue_id": "d"}), "x:2: .*'d' .*data.x:1 "),
    (json.dumps(OWN | {"dialogue_id": "a\ud800"}), "'dialogue_id' must be a printable text or a whole number"),
    (json.dumps(OWN | {"persona": []}), "yields no dialogue .*1: no persona"),
    (json.dumps(OWN | {"turns": OWN["turns"][:1]}), "yields no dialogue .*1: no reply"),
    (json.dumps({"train": [{"personality": ["a"], "utterances": [{"candidates": [], "history": []}]}]}), "gold reply"),
    (json.dumps(CYNAPTICS | {"dialogue": ["untagged"]}), "Persona A"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(KestrelError, match=message):
        read(write(tmp_path, content))


def test_a_named_format_must_fit(tmp_path: Path) -> None:
    for held in FORMATS:
        source = write(tmp_path, LAYOUTS[held])
        for named in FORMATS:
            if named == held:
                assert open_corpus(source, named).format == held
            else:
                with pytest.raises(KestrelError, match=f"not in the format {named}.* looks like {held}"):
                    open_corpus(source, named)
    with pytest.raises(KestrelError, match="'parley' is not a data format"):
        open_corpus(source, "parley")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, parlai("self"), "train_self.txt")
    with pytest.raises(KestrelError, match="nearest name there is .*train_self.txt"):
        open_corpus(str(tmp_path / "train_slef.txt"))


# --- the Hub, from a cache made by hand: what a download leaves behind ---


def in_cache(home: Path, repo: str, revision: str, name: str, content: bytes) -> None:
    folder = home / "hub" / ("datasets--" + repo.replace("/", "--"))
    write(folder / "snapshots" / ("c" * 40), content, name)
    write(folder / "refs", "c" * 40, revision)


def in_fresh_process(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(key, None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_hub_sets_from_the_cache(tmp_path: Path) -> None:
    rows = [{"personality": PERSONA, "conv_id": 3, **step} for step in steps()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    content = (tmp_path / "made.parquet").read_bytes()
    for split in ("train", "validation"):
        in_cache(
            tmp_path, "bavard/personachat_truecased", "refs/convert/parquet", f"full/{split}/0000.parquet", content
        )
    for split in ("train", "valid", "test"):
        name = f"data/Synthetic-Persona-Chat_{split}.csv"
        in_cache(tmp_path, "google/Synthetic-Persona-Chat", "main", name, LAYOUTS["synthetic"].encode())
    done = in_fresh_process(
        tmp_path,
        "from kestrel.corpora import *\n"
        "for name in ('bavard/personachat_truecased', 'google/Synthetic-Persona-Chat'):\n"
        "    corpus = open_corpus(name)\n"
        "    counts = [len(list(corpus.read(split, Tally()))) for split in corpus.splits]\n"
        "    print(corpus.format, *corpus.splits, *counts, corpus.fingerprint['hub revision'][:3])\n"
        "try: open_corpus('nobody/nothing')\n"
        "except Exception as error: print(type(error).__name__, error)\n",
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["truecased train validation 1 1 ccc", "synthetic train validation test 2 2 2 ccc"], done.stderr
    assert lines[2].startswith("KestrelError nobody/nothing (revision main) is not a file here")
    assert "HF_HUB_OFFLINE" in lines[2]
    assert len(lines) == 3


# --- any input at all: dialogues that hold the invariants, or one clear error ---

TOKENS = st.sampled_from(
    [
        "1 ",
        "2 ",
        "\n",
        "\t",
        "|",
        "your persona: ",
        "partner's persona: ",
        "User 1: ",
        "User 2: ",
        "[user 1's name]",
        ":",
    ]
    + ["__ SILENCE __", "\0", "\u2028", "\u00e9", '"', ",", "{", "}", "[", "]", "hi", "hi.", "(name)", "* ", "\r", " "]
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(TOKENS, max_size=40).map("".join))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
ANY_JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
SPOKEN = st.lists(ANY_TEXT, max_size=6)
ROWS = {
    "huggingface": {"personality": SPOKEN, "utterances": st.lists(st.fixed_dictionaries({"candidates": SPOKEN, "history": SPOKEN}), max_size=3)},
    "truecased": {"personality": SPOKEN, "candidates": SPOKEN, "history": SPOKEN, "conv_id": st.integers(0, 3)},
    "cynaptics": {"conv_id": st.integers(0, 3), "persona_b": SPOKEN, "dialogue": st.lists(ANY_TEXT.map("Persona A: {}".format) | ANY_TEXT.map("Persona B: {}".format), max_size=5), "reference": ANY_TEXT},
    "synthetic": {"user 1 personas": ANY_TEXT, "user 2 personas": ANY_TEXT, "Best Generated Conversation": ANY_TEXT},
    "kaggle": {"Persona": ANY_TEXT, "chat": ANY_TEXT},
    "kestrel": {"persona": SPOKEN, "turns": st.lists(st.fixed_dictionaries({"speaker": st.sampled_from(["self", "partner"]), "text": ANY_TEXT}), max_size=6)},
}  # fmt: skip


@st.composite
def jsonl(draw: st.DrawFn) -> bytes:
    """Rows of one format; now and then one value is anything."""
    columns = ROWS[draw(st.sampled_from(sorted(ROWS)))]
    records = draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=4))
    if draw(st.booleans()):
        draw(st.sampled_from(records))[draw(st.sampled_from(sorted(columns)))] = draw(ANY_JSON)
    if draw(st.booleans()):
        return json.dumps({"train": records}).encode()
    return "\n".join(json.dumps(record) for record in records).encode()


@st.composite
def numbered(draw: st.DrawFn) -> bytes:
    texts = draw(st.lists(ANY_TEXT.filter(lambda text: "\n" not in text), max_size=8))
    return "".join(f"{number} {text}\n" for number, text in enumerate(texts, 1)).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = LAYOUTS[draw(st.sampled_from(FORMATS))].encode()
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.binary(max_size=3)) + content[draw(st.integers(at, min(at + 3, len(content)))) :]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=jsonl() | numbered() | damaged() | ANY_TEXT.map(lambda text: text.encode("utf-8", "replace")))
def test_any_input_gives_dialogues_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    try:
        read(write(folder, content))
    except KestrelError as error:
        assert str(error)
    finally:
        shutil.rmtree(folder)
