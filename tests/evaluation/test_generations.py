"""Reading generation files and aligning several of them: what is refused, by file and line, and what is noted."""

import json
from pathlib import Path

import pytest

from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.evaluation.alignment import align
from kestrel.evaluation.generations import read_generations
from kestrel.generation.files import split_and_system


def row(**changes):
    """A whole row; a key set to None is left out."""
    whole = {
        "dialogue_id": "d1",
        "turn": 1,
        "persona": ["i like dogs ."],
        "history": [{"speaker": "partner", "text": "hi"}],
        "reference": "hello",
        "response": "hey",
        "stopped_by": "eos",
        "response_tokens": 2,
        "reference_nll": 3.5,
        "reference_tokens": 2,
        "candidate_nll": [[4.0, 2], [5.0, 3]],
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "split", "system"),
    [
        ("test.adapter.jsonl", "test", "adapter"),
        ("validation.my.model.jsonl", "validation", "my.model"),
        ("theirs.jsonl", None, "theirs"),
        ("gpt4.v2.jsonl", None, "gpt4.v2"),
        ("test.jsonl", None, "test"),
    ],
)
def test_a_file_names_its_split_and_system(name, split, system):
    assert split_and_system(Path("some/folder") / name) == (split, system)


def test_every_value_arrives(tmp_path):
    said = {"speaker": "partner", "text": "hi\nthere", "emotion": "calm"}
    first = row(response="two\r\nlines", history=[said])
    file = read_generations(write(tmp_path / "test.adapter.jsonl", [first, "", row(turn=3)]))
    first, second = file.replies
    assert first.response == "two lines"
    assert first.history == (Turn("partner", "hi there"),)
    assert tuple(first.candidate_nll) == ((4.0, 2), (5.0, 3)) and first.candidate_nll[1] == (5.0, 3)
    assert (first.reference_nll, first.reference_tokens, first.stopped_by) == (3.5, 2, "eos")
    assert (second.turn, second.line) == (3, 3)  # the blank line counts
    assert file.missing == () and not file.numbered


def test_only_some_replies_have_candidates_and_escaped_emoji_is_text(tmp_path):
    rows = [row(response="🙂"), row(turn=3, candidate_nll=None), row(turn=5, candidate_nll=[])]
    file = read_generations(write(tmp_path / "x.jsonl", rows))
    assert [reply.candidate_nll is None for reply in file.replies] == [False, True, True]
    assert file.replies[0].response == "🙂"


def test_plain_history_ends_with_the_partner(tmp_path):
    rows = [row(history=["a", "b", "c"]), row(turn=3, history=["a", "b"])]
    first, second = read_generations(write(tmp_path / "x.jsonl", rows)).replies
    assert [turn.speaker for turn in first.history] == ["partner", "self", "partner"]
    assert [turn.speaker for turn in second.history] == ["self", "partner"]


def test_two_keys_are_enough(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"reference": "a", "response": ""}\n' * 2)  # with the mark some editors write
    file = read_generations(path)
    assert file.numbered
    assert [reply.dialogue_id for reply in file.replies] == ["row 1", "row 2"]
    assert set(file.missing) >= {"dialogue_id", "history", "persona", "reference_nll", "candidate_nll"}


def test_without_turns_the_replies_of_a_dialogue_are_counted(tmp_path):
    rows = [row(turn=None), row(turn=None), row(turn=None, dialogue_id="d2")]
    file = read_generations(write(tmp_path / "x.jsonl", rows))
    assert [reply.key for reply in file.replies] == [("d1", 1), ("d1", 3), ("d2", 1)]


@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        ([row(), row(turn=3, reference=None)], 2, "reference: Field required"),
        ([row(reference="  ")], 1, "reference is empty"),
        ([row(reference=["a", 7])], 1, "reference: Input should be a valid string"),
        ([row(reference=["a", ""])], 1, "reference is empty"),
        ([row(response=7)], 1, "response: Input should be a valid string"),
        ([row(), row()], 2, "dialogue 'd1', turn 1 is in line 1 already"),
        ([row(), row(turn=3, persona=None)], 2, "persona is missing, other rows have it"),
        ([row(turn=None), row(turn=3)], 1, "turn is missing, other rows have it"),
        ([row(reference_nll=float("nan"))], 1, "reference_nll: Input should be a finite number"),
        ([row(reference_nll=-1.0)], 1, "reference_nll: Input should be greater than or equal to 0"),
        ([row(reference_nll=True)], 1, "reference_nll: Input should be a valid number"),
        ([row(reference_tokens=0)], 1, "reference_tokens: Input should be greater than or equal to 1"),
        ([row(reference_tokens=2.0)], 1, "reference_tokens: Input should be a valid integer"),
        ([row(reference_tokens=None)], 1, "reference_nll and reference_tokens belong together"),
        ([row(candidate_nll=[[1.0, 0]])], 1, "candidate_nll.0.1: Input should be greater than or equal to 1"),
        ([row(candidate_nll=[1.0])], 1, "candidate_nll.0: Input should be a valid list"),
        ([row(candidate_nll=[[1.0]])], 1, "candidate_nll.0.1: Field required"),
        ([row(stopped_by="tired")], 1, "stopped_by: Input should be 'eos', 'length' or 'stop_string'"),
        ([row(history=7)], 1, "history: Input should be a valid list"),
        ([row(history=["hi", ["self", "hi"]])], 1, "history.1.speaker: Input should be 'partner' or 'self'"),
        (
            [row(history=[{"speaker": "bob", "text": "hi"}])],
            1,
            "history.0.speaker: Input should be 'partner' or 'self'",
        ),
        ([row(history=[{"speaker": "self"}])], 1, "history.0.text: Input should be a valid string"),
        ([row(persona=7)], 1, "persona: Input should be a valid list"),
        ([row(turn=-1)], 1, "turn: Input should be greater than or equal to 0"),
        ([row(dialogue_id=1.5)], 1, "dialogue_id: Input should be a valid string"),
        ([row(), "{"], 2, "not JSON"),
        ([row(response="\ud83d")], 1, "not JSON"),  # half of a surrogate pair, which no file can hold
        (["[" * 100_000], 1, "not JSON"),
        ([row(), "[1, 2]"], 2, "expected an object"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, rows, line, says):
    path = write(tmp_path / "test.adapter.jsonl", rows)
    with pytest.raises(KestrelError) as refusal:
        read_generations(path)
    assert f"  {path}:{line}: {says}" in str(refusal.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(KestrelError, match="does not exist"):
        read_generations(tmp_path / "none.jsonl")
    with pytest.raises(KestrelError, match="is a folder"):
        read_generations(tmp_path)
    with pytest.raises(KestrelError, match="and 40 more"):
        read_generations(write(tmp_path / "many.jsonl", [row(turn=i, stopped_by="?") for i in range(50)]))
    with pytest.raises(KestrelError, match="has no rows"):
        read_generations(write(tmp_path / "empty.jsonl", ["", " "]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"reference": "a", "response": "b"}\n{"reference": "caf\xe9"}\n')
    with pytest.raises(KestrelError, match=r"latin.jsonl:2: not UTF-8"):
        read_generations(tmp_path / "latin.jsonl")


def read_all(*paths: Path):
    return align([read_generations(path) for path in paths])


def test_files_meet_on_the_replies_that_all_have(tmp_path):
    first = write(tmp_path / "test.a.jsonl", [row(turn=t, reference=f"r{t}") for t in (1, 3, 5)])
    second = write(tmp_path / "test.b.jsonl", [row(turn=t, reference=f"r{t}") for t in (5, 1, 7)])
    files, notes = read_all(first, second)
    assert [[reply.turn for reply in file.replies] for file in files] == [[1, 5], [1, 5]]
    assert [note.split(". ")[0] for note in notes] == ["WARNING: the files do not cover the same replies"] * 2


def test_different_references_are_refused(tmp_path):
    first = write(tmp_path / "test.a.jsonl", [row(), row(turn=3)])
    second = write(tmp_path / "test.b.jsonl", [row(), row(turn=3, reference="Hello")])
    with pytest.raises(
        KestrelError, match=r"references differ: .*test.a.jsonl:2 has 'hello', .*test.b.jsonl:2 has 'Hello'"
    ):
        read_all(first, second)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("validation.a", {}, r"validation.a.jsonl is of split validation, .*test.a.jsonl of split test"),
        ("b", {"dialogue_id": "d9"}, "share no"),
    ],
)
def test_other_splits_and_other_dialogues_are_refused(tmp_path, name, changes, says):
    with pytest.raises(KestrelError, match=says):
        read_all(write(tmp_path / "test.a.jsonl", [row()]), write(tmp_path / f"{name}.jsonl", [row(**changes)]))


def test_seeds_of_one_system(tmp_path):
    """Runs in several folders, or seeds in the file's name; the base that both runs wrote alike is one system."""
    paths = [
        write(tmp_path / run / "generations" / f"test.{system}.jsonl", [row(response=text)])
        for run, system, text in (
            ("one", "adapter", "x"), ("one", "base", "same"), ("two", "adapter", "y"), ("two", "base", "same"),
        )
    ]  # fmt: skip
    files, notes = read_all(*paths)
    assert [file.system for file in files] == ["adapter@one", "base", "adapter@two"]
    assert [file.group for file in files] == ["adapter", "base", "adapter"]
    assert len(notes) == 1 and "scored once" in notes[0]
    seeds = [write(tmp_path / f"test.lora-seed{n}.jsonl", [row(response=str(n))]) for n in (1, 22)]
    files, _ = read_all(*seeds)
    assert [(file.system, file.group) for file in files] == [("lora-seed1", "lora"), ("lora-seed22", "lora")]


def test_a_file_cannot_take_the_name_of_our_rows(tmp_path):
    files, _ = read_all(write(tmp_path / "gold.jsonl", [row()]), write(tmp_path / "copy_partner.jsonl", [row()]))
    assert not {file.system for file in files} & {"gold", "copy_partner"}
    assert len({file.system for file in files}) == 2


def test_a_file_without_ids_follows_one_with_them(tmp_path):
    named = write(tmp_path / "test.a.jsonl", [row(), row(turn=3, reference="bye")])
    bare = [{"reference": "hello", "response": "1"}, {"reference": "bye", "response": "2"}]
    files, _ = read_all(write(tmp_path / "bare.jsonl", bare), named)
    assert [reply.key for reply in files[0].replies] == [("d1", 1), ("d1", 3)]
    assert [reply.response for reply in files[0].replies] == ["1", "2"]
    with pytest.raises(KestrelError, match="has 1 rows and no dialogue_id, .* has 2"):
        read_all(write(tmp_path / "short.jsonl", bare[:1]), named)
    with pytest.raises(KestrelError, match="references differ"):
        read_all(write(tmp_path / "swapped.jsonl", bare[::-1]), named)
