"""Splits: what may stand in which, on corpora drawn at random and written to disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_corpora import read as read_all

from kestrel.config.settings import Data
from kestrel.data.corpus import open_corpus
from kestrel.data.read_counts import ReadCounts
from kestrel.data.reading import Reading
from kestrel.data.repair import persona_key
from kestrel.data.splits import MIXED, PARTNER_HELD, TOO_MANY, Splitter
from kestrel.dialogue import Dialogue
from kestrel.errors import KestrelError

ROOT = Path(__file__).resolve().parents[2]
TURNS = [{"speaker": "partner", "text": "hi"}, {"speaker": "self", "text": "hello"}]


def line(number: int, persona: int, conversation: int | None = None, partner: int | None = None) -> dict[str, Any]:
    record = {"dialogue_id": f"d{number}", "persona": [f"I am {persona}.", "I like tea."], "turns": TURNS}
    if conversation is not None:
        record["conversation_id"] = conversation
    if partner is not None:
        # The same sentences in another order and spelling are the same persona.
        record["partner_persona"] = ["i like tea", f"i am {partner}"]
    return record


def save(path: Path, records: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(splitter: Splitter) -> Iterator[tuple[str, list[Dialogue], ReadCounts]]:
    for split in splitter.splits:
        counts = ReadCounts()
        yield split, list(splitter.read(split, counts)), counts


DIALOGUES = st.lists(
    st.tuples(st.integers(0, 12), st.none() | st.integers(0, 15), st.none() | st.integers(0, 12)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=DIALOGUES, seed=st.integers(0, 5), shares=st.tuples(*[st.sampled_from([0, 0.05, 0.3])] * 2))
def test_no_persona_and_no_conversation_leaks(
    tmp_path: Path, drawn: list[tuple[int, int | None, int | None]], seed: int, shares: tuple[float, float]
) -> None:
    source = save(tmp_path / "data.jsonl", [line(number, *each) for number, each in enumerate(drawn)])
    try:
        splitter = Splitter(open_corpus(Data(source=source)), *shares, seed=seed)
        found = {split: (dialogues, counts) for split, dialogues, counts in read(splitter)}
    except KestrelError as error:
        assert "too few conversations" in str(error)
        return
    asked = {split for split, share in zip(("validation", "test"), shares, strict=True) if share}
    assert set(found) == {"train"} | asked
    owners = {split: {persona_key(each.persona) for each in dialogues} for split, (dialogues, _) in found.items()}
    in_train = owners["train"] | {persona_key(each.partner_persona) for each in found["train"][0]}
    conversations = [{each.conversation_id for each in dialogues} for dialogues, _ in found.values()]
    assert all(owners[split] for split in asked)
    if splitter.persona_overlap:  # cut by dialogue
        assert len(set().union(*owners.values())) < 3 + len(asked) * 12
    else:
        assert not any(owners[split] & in_train for split in asked)
        assert len(asked) < 2 or not owners["validation"] & owners["test"]
    assert sum(map(len, conversations)) == len(set().union(*conversations))
    # Every dialogue is accounted for once.
    assert sum(counts.read for _, counts in found.values()) == len(drawn)
    for dialogues, counts in found.values():
        assert counts.kept == len(dialogues)
        assert counts.read == counts.kept + counts.dropped.total()
        assert set(counts.dropped) <= {MIXED, PARTNER_HELD}


def test_sides_of_people_who_all_hang_together_are_counted_where_they_are_left_out(tmp_path: Path) -> None:
    records = []
    for number in range(50):
        sides = (number, (number + 1) % 50)
        records += [line(2 * number + side, sides[side], number, sides[1 - side]) for side in (0, 1)]
    splitter = Splitter(open_corpus(Data(source=save(tmp_path / "data.jsonl", records))), 0.1, 0.1)
    dropped = {split: counts.dropped for split, _, counts in read(splitter)}
    assert dropped["test"][MIXED] and dropped["validation"][MIXED] and not dropped["train"]


@pytest.mark.parametrize(
    ("native", "origin"),
    [
        (["train"], {"train": "train", "validation": "cut from train", "test": "cut from train"}),
        (["train", "valid"], {"train": "train", "validation": "cut from train", "test": "validation"}),
        (["train", "test"], {"train": "train", "validation": "cut from train", "test": "test"}),
        (["train", "dev", "test"], {"train": "train", "validation": "validation", "test": "test"}),
    ],
)
def test_native_splits_are_kept_and_overlap_is_reported(
    tmp_path: Path, native: list[str], origin: dict[str, str]
) -> None:
    for at, name in enumerate(native):
        save(tmp_path / f"{name}.jsonl", [line(100 * at + number, number + 15 * at) for number in range(20)])
    splitter = Splitter(open_corpus(Data(source=str(tmp_path))))
    assert splitter.origin == origin
    sizes = {split: len(dialogues) for split, dialogues, _ in read(splitter)}
    cut = sum(size for split, size in sizes.items() if origin[split] in ("train", "cut from train"))
    assert cut == 20
    for split, came_from in origin.items():
        if came_from in ("validation", "test"):
            assert sizes[split] == 20
            at = 1 if len(native) == 2 or split == "validation" else 2
            assert splitter.persona_overlap[split] == {"personas": 20, "in_train": 5 if at == 1 else 0}


def test_a_source_is_read_once(tmp_path: Path) -> None:
    """Whatever is cut from it; its dialogues come back as they were read, and no file is left."""
    folder = tmp_path / "folder"
    folder.mkdir()
    records = [
        line(number, number % 40, None, number % 7) | {"turns": (TURNS * 3)[number % 2 :]} for number in range(200)
    ]
    for record in records:
        record["candidates"] = [["no ."], [], ["é", "字"]]
    source = save(tmp_path / "data.jsonl", records)
    expected = {each.dialogue_id: each for each in read_all(source)[0]}
    splitter = Splitter(open_corpus(Data(source=source)), 0.1, 0.1, folder=folder)
    os.unlink(source)
    assert os.listdir(folder) == []
    found = [each for _, dialogues, _ in read(splitter) for each in dialogues]
    assert all(each == expected[each.dialogue_id] for each in found) and len(found) > 100
    assert found == [each for _, dialogues, _ in read(splitter) for each in dialogues]


def test_what_a_reader_repaired_is_told_of_the_split_of_the_dialogue(tmp_path: Path) -> None:
    records = [line(number, number) for number in range(40)]
    for number in (3, 17):
        records[number]["persona"] = [f"I am {number}.", ""]
    source = save(tmp_path / "data.jsonl", records)
    whole, total = read_all(source)[1], ReadCounts()
    for _, dialogues, counts in read(Splitter(open_corpus(Data(source=source)), 0.2, 0.2)):
        repaired = sum(each.dialogue_id in ("d3", "d17") for each in dialogues)
        assert counts.repaired.total() == repaired
        total.add(counts)
    assert (total.read, total.kept, total.repaired) == (whole.read, whole.kept, whole.repaired)
    assert total.first.keys() == whole.first.keys()


def test_what_is_dropped_counts_for_the_dialogue_that_follows(tmp_path: Path) -> None:
    kept, dropped = line(0, 0), {"persona": [], "turns": []}
    records = [*[dropped] * 5, kept, *[dropped] * 4, kept, kept, dropped]
    source = save(tmp_path / "data.jsonl", [record | {"dialogue_id": f"d{n}"} for n, record in enumerate(records)])
    reading = Reading(open_corpus(Data(source=source)), "train")
    assert [counted.read for _, counted, _ in reading.dialogues()] == [6, 5, 1] and reading.rest.read == 1


def test_max_dialogues(tmp_path: Path) -> None:
    source = save(tmp_path / "data.jsonl", [line(number, number % 20) for number in range(100)])
    chosen = {}
    for seed in (0, 1):
        splitter = Splitter(open_corpus(Data(source=source)), 0.2, 0.2, seed=seed, max_dialogues=7)
        for split, dialogues, counts in read(splitter):
            assert len(dialogues) == 7
            assert counts.dropped == {TOO_MANY: counts.read - 7}
            chosen[split, seed] = [each.dialogue_id for each in dialogues]
    assert chosen["train", 0] != chosen["train", 1]
    assert chosen["train", 0] != [f"d{number}" for number in range(7)]


def test_persona_less_dialogues_are_cut_by_conversation(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    path.write_text("".join(f"1 hi {number}\thello {number}\n" for number in range(40)))
    sizes = [len(dialogues) for _, dialogues, _ in read(Splitter(open_corpus(Data(source=str(path)))))]
    assert sizes == [36, 2, 2]


def test_both_sides_of_convai2_stay_together(tmp_path: Path) -> None:
    """ParlAI's self files hold each conversation once for each owner, with nothing but the words to tell it."""
    text = ""
    for number in range(40):
        said = [f"utterance {number} {at}" for at in range(10)]
        for persona, turns in ((f"owner {number}", said), (f"owner {number + 100}", ["__ SILENCE __", *said[:9]])):
            text += f"1 your persona: {persona}\n"
            text += "".join(f"{at // 2 + 2} {turns[at]}\t{turns[at + 1]}\n" for at in range(0, 10, 2))
    path = tmp_path / "train.txt"
    path.write_text(text)
    splitter = Splitter(open_corpus(Data(source=str(path))), 0.1, 0.1)
    where = {dialogue.conversation_id: split for split, dialogues, _ in read(splitter) for dialogue in dialogues}
    assert len(where) == 40
    words = {split: set() for split in splitter.splits}
    for split, dialogues, _ in read(splitter):
        words[split] |= {turn.text for dialogue in dialogues for turn in dialogue.turns}
    assert not words["train"] & (words["validation"] | words["test"])


def test_the_same_in_another_process(tmp_path: Path) -> None:
    source = save(tmp_path / "data.jsonl", [line(number, number % 30) for number in range(90)])
    here = [
        [each.dialogue_id for each in dialogues] for _, dialogues, _ in read(Splitter(open_corpus(Data(source=source))))
    ]
    code = (
        "import sys, json\nfrom kestrel.config.settings import Data\nfrom kestrel.data.corpus import *\nfrom kestrel.data.read_counts import *\nfrom kestrel.data.splits import Splitter\n"
        "s = Splitter(open_corpus(Data(source=sys.argv[1])))\n"
        "print(json.dumps([[d.dialogue_id for d in s.read(split, ReadCounts())] for split in s.splits]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, source], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == here
    # The choice itself is part of the contract: a run of last year must find the same test set.
    assert here[2] == ["d10", "d25", "d40", "d55", "d70", "d85"]


def test_one_persona_is_cut_by_dialogue_and_it_is_said(tmp_path: Path) -> None:
    for count, sizes in ((40, [36, 2, 2]), (3, [1, 1, 1])):
        source = save(tmp_path / "data.jsonl", [line(number, 0) for number in range(count)])
        splitter = Splitter(open_corpus(Data(source=source)))
        assert [len(dialogues) for _, dialogues, _ in read(splitter)] == sizes
        assert splitter.origin["test"] == "cut from train by dialogue"
        assert splitter.persona_overlap == {split: {"personas": 1, "in_train": 1} for split in ("validation", "test")}


def test_pairs_of_personas_that_meet_once_lose_nothing(tmp_path: Path) -> None:
    """Both sides of a conversation, and three conversations of the same two people."""
    records = []
    for number in range(40):
        for at in range(3 if number % 2 else 1):
            sides = (2 * number, 2 * number + 1)
            records += [line(len(records) + side, sides[side], 10 * number + at, sides[1 - side]) for side in (0, 1)]
    splitter = Splitter(open_corpus(Data(source=save(tmp_path / "data.jsonl", records))))
    found = {split: dialogues for split, dialogues, counts in read(splitter) if not counts.dropped}
    assert sum(map(len, found.values())) == len(records)
    personas = [{persona_key(each.persona) for each in dialogues} for dialogues in found.values()]
    assert len(set.union(*personas)) == sum(map(len, personas)) == 80
    assert len(personas[1]) == len(personas[2]) == 4


def test_too_few_conversations_to_cut(tmp_path: Path) -> None:
    source = save(tmp_path / "data.jsonl", [line(number, number % 2, number % 2) for number in range(9)])
    with pytest.raises(KestrelError, match=r"too few conversations \(2\) .* 3 are needed"):
        Splitter(open_corpus(Data(source=source)))


def test_the_same_id_in_two_splits_names_both_places(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", [line(0, 0), line(1, 1)])
    save(tmp_path / "test.jsonl", [line(2, 2), line(1, 3)])
    with pytest.raises(KestrelError, match="test.jsonl:2: .*'d1' is used at .*train.jsonl:2 already"):
        Splitter(open_corpus(Data(source=str(tmp_path))))
