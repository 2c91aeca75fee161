"""Other tools' outputs are read as ours are, or refused with the key or the line and the way out."""

import json
from pathlib import Path

import pytest

from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.evaluation.generations import read_generations

PAIRS = [("i keep bees .", "i look after my bees ."), ("no , too cold .", "the lake is too cold .")]


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows(response: str = "response", reference: str = "reference") -> list[dict]:
    return [{response: said, reference: gold} for said, gold in PAIRS]


@pytest.mark.parametrize(
    "content",
    [
        rows(),
        json.dumps(rows()),  # an array on one line
        {"first": rows()[0], "second": rows()[1]},
        json.dumps({"a": rows()[0], "b": rows()[1]}),
        {"predictions": rows("hypothesis", "target")},
        {"model": "theirs", "version": 2, "results": rows()},
        lines(rows("prediction", "label")),
        lines(rows("generated_text", "ground_truth")),
        lines([row | {"label": [row["label"]]} for row in rows("output", "label")]),
    ],
)
def test_forms_and_names(tmp_path, content):
    file = read_generations(written(tmp_path / "theirs.json", content))
    assert [(reply.response, reply.reference) for reply in file.replies] == PAIRS
    assert len({reply.key for reply in file.replies}) == 2


def test_ids_personas_and_histories_of_others(tmp_path):
    row = {
        "conversation_id": 7, "personas": "i keep bees .\ni live by a lake .", "response": "a",
        "context": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, "and you ?"],
        "references": ["b", "c"],
    }  # fmt: skip
    (reply,) = read_generations(written(tmp_path / "x.json", [row])).replies
    assert (reply.dialogue_id, reply.references) == ("7", ("b", "c"))
    assert reply.persona == ("i keep bees .", "i live by a lake .")
    assert reply.history == (Turn("partner", "hi"), Turn("self", "yo"), Turn("partner", "and you ?"))


def test_a_world_log_of_parlai(tmp_path):
    def exchange(text: str, labels: list[str], said: str) -> list[dict]:
        return [{"id": "convai2", "text": text, "eval_labels": labels}, {"id": "model", "text": said}]

    first = exchange("your persona: i keep bees.\nyour persona: i swim.\nhello", ["hi", "hey"], "yo")
    log = [{"dialog": [first, exchange("you ?", ["fine"], "ok")]}, {"dialog": [exchange("hm", ["so"], "no")]}]
    file = read_generations(written(tmp_path / "log.jsonl", lines(log)))
    one, two, three = file.replies
    assert [reply.key for reply in file.replies] == [("dialogue 1", 1), ("dialogue 1", 3), ("dialogue 2", 1)]
    assert one.references == ("hi", "hey") and one.history == (Turn("partner", "hello"),)
    assert two.persona == one.persona == ("i keep bees.", "i swim.")
    assert [turn.text for turn in two.history] == ["hello", "hi", "you ?"] and three.history == (Turn("partner", "hm"),)
    log[1]["dialog"] = [[{"text": "hm"}, {"text": "no"}]]
    with pytest.raises(KestrelError, match=r"log\.jsonl:2: dialog\.0: expected an act with eval_labels"):
        read_generations(written(tmp_path / "log.jsonl", lines(log)))


def test_lines_of_text_with_several_references(tmp_path):
    hypotheses = written(tmp_path / "gpt.hyp.txt", "a\nb\n")
    with pytest.raises(KestrelError, match=r"gpt\.hyp\.txt needs its references .* in gpt\.ref\.txt"):
        read_generations(hypotheses)
    written(tmp_path / "gpt.ref0.txt", "A\r\nB\r\n")
    written(tmp_path / "gpt.ref1.txt", "AA\nBB")
    file = read_generations(hypotheses)
    assert file.system == "gpt"
    assert [(r.response, r.references) for r in file.replies] == [("a", ("A", "AA")), ("b", ("B", "BB"))]
    written(tmp_path / "gpt.ref1.txt", "AA\n")
    with pytest.raises(KestrelError, match=r"has 2 lines and .*gpt\.ref1\.txt 1"):
        read_generations(hypotheses)


@pytest.mark.parametrize(
    ("row", "fields", "says"),
    [
        ({"reply": "a", "gold": "b"}, [], r"no key is called response; its keys are gold, reply\. .*response=KEY"),
        ({"pred": "a", "output": "b", "gold": "c"}, [], r"pred and output could each be the response; .*response=pred"),
        ({"response": "a", "text": "b"}, [], "no key is called reference"),
        ({"response": "a", "gold": "b"}, ["reference=truth"], "evaluation.fields names truth, but its keys are"),
    ],
)
def test_keys_that_could_mean_anything_are_asked_for(tmp_path, row, fields, says):
    with pytest.raises(KestrelError, match=says):
        read_generations(written(tmp_path / "x.jsonl", lines([row])), fields)


def test_keys_by_name_go_before_all_others(tmp_path):
    path = written(tmp_path / "x.jsonl", lines([{"reply": "a", "response": "not this", "gold": "b"}]))
    (reply,) = read_generations(path, ["response=reply"]).replies
    assert (reply.response, reply.reference) == ("a", "b")


def test_what_is_no_output_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    with pytest.raises(KestrelError, match="is a Git LFS pointer"):
        read_generations(written(tmp_path / "x.jsonl", pointer))
    with pytest.raises(KestrelError, match=r"x\.json: row 2: response: Field required"):
        read_generations(written(tmp_path / "x.json", [rows()[0], {"reference": "b"}]))
    with pytest.raises(KestrelError, match=r"x\.json has no rows"):
        read_generations(written(tmp_path / "x.json", []))
    with pytest.raises(KestrelError, match=r"x\.csv is a table, and generations are JSON; .*orient='records'"):
        read_generations(written(tmp_path / "x.csv", "response,reference\na,b\n"))
