"""docs/your-own-data.md is true: its examples are read, its programs executed, its messages printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from children import ROOT, python
from make_corpora import read
from make_models import write_base, write_config

import preprocess
from kestrel.dialogue import Dialogue

OWN_DATA = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")

FILES = dict(re.findall(r"^`([\w.-]+)`:\n\n```\w+\n(.*?)```$", OWN_DATA, re.DOTALL | re.MULTILINE))
PROGRAMS = re.findall(r"^```python\n(.*?)```$", OWN_DATA, re.DOTALL | re.MULTILINE)
MISTAKES = re.findall(
    r"^### (.+?)\n(?:(?!^#).)*?^(<!-- alone -->\n)?```json\n(.*?)```\n\n```text\n(.*?)```$",
    OWN_DATA,
    re.DOTALL | re.MULTILINE,
)
ANIMALS = ["dog", "cat", "horse", "parrot", "rabbit", "turtle", "goose", "lizard"]


def dialogues_of(path: Path) -> list[Dialogue]:
    return read(str(path))[0]


def execute(program: str, folder: Path) -> None:
    done = python("-W", "error::SyntaxWarning", "-c", f"import os; os.chdir({str(folder)!r})\n{program}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's input files and what its programs make of them."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    for program in PROGRAMS:
        execute(program, folder)
    return folder


def test_the_page_has_the_tested_examples() -> None:
    assert FILES.keys() == {"my-dialogues.jsonl", "chats.csv", "whatsapp.txt", "sharegpt.json"}
    assert len(PROGRAMS) == 2 and len(MISTAKES) == 10


@pytest.mark.parametrize("name", ["my-dialogues", "from-table", "both-sides"])
def test_converted_examples_are_read_without_loss(converted: Path, name: str) -> None:
    dialogues, counts = read(str(converted / f"{name}.jsonl"))
    assert dialogues and counts.kept == counts.read and not counts.dropped
    # Turns of the partner after the last reply have no answer.
    assert counts.repaired.keys() <= {"turns removed: by the partner after the last reply"}


def test_the_form_is_read_as_the_page_says(converted: Path) -> None:
    first, second = dialogues_of(converted / "my-dialogues.jsonl")
    assert first.dialogue_id == "train-000000" and second.dialogue_id == "chat-7"
    assert second.candidates == (("no .", "i like trains ."), ("yes .", "what is your name ?"))
    form = OWN_DATA.partition("## The form")[2].partition("\n## ")[0]
    fields = set(re.findall(r"^\| `([\w.\[\]]+)` \|", form, re.MULTILINE))
    given = {key for line in FILES["my-dialogues.jsonl"].splitlines() for key in json.loads(line)}
    assert given | {"turns[].speaker", "turns[].text", "conversation_id"} == fields


@pytest.mark.parametrize(("comma", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8-sig")])
def test_the_table_program_reads_what_spreadsheets_write(comma, encoding, tmp_path):
    rows = ["chat,speaker,text,persona", "1,customer,Hello; is it late?,", "1,clerk,It is.,I work at night."]
    table = "".join(comma.join(f'"{cell}"' for cell in row.split(",")) + "\r\n" for row in rows)
    (tmp_path / "chats.csv").write_bytes(table.encode(encoding))
    execute(PROGRAMS[0], tmp_path)
    (dialogue,) = dialogues_of(tmp_path / "from-table.jsonl")
    assert [turn.text for turn in dialogue.turns] == ["Hello; is it late?", "It is."]
    assert dialogue.persona == ("I work at night.",)


def test_the_exports_are_read_with_the_settings_of_the_page(converted: Path) -> None:
    asked = yaml.safe_load(re.search(r"```yaml\n(data:.*?)```", OWN_DATA, re.DOTALL)[1])["data"]
    asked["session_gap"] = float(asked["session_gap"])
    source = str(converted / asked.pop("source"))
    dialogues, counts = read(source, **asked)
    assert [len(dialogue.turns) for dialogue in dialogues] == [2, 2, 2]
    assert dialogues[0].turns[1].text.endswith("the cat found her, mail me at [email]")
    assert counts.repaired["e-mail addresses replaced"] == 1 and dialogues[0].persona == tuple(asked["persona"])
    (mira,), counts = read(str(converted / "sharegpt.json"))
    assert mira.persona == ("You are Mira. You repair violins.",) and counts.dropped == {"no persona": 1}


def test_the_programs_keep_the_speakers(converted: Path) -> None:
    hotel, inn = dialogues_of(converted / "from-table.jsonl")
    assert hotel.persona == ("I work at the night desk.", "I love old maps.") and inn.dialogue_id == "2"
    assert [turn.speaker for turn in hotel.turns] == ["partner", "self", "partner", "self"]
    *_, ours, theirs = dialogues_of(converted / "both-sides.jsonl")
    assert theirs.conversation_id == ours.conversation_id and theirs.persona == ours.partner_persona


def test_both_sides_of_rows_with_a_number_and_without_an_id(tmp_path: Path) -> None:
    rows = [{**json.loads(valid_line("cat")), "partner_persona": ["i ask ."]}] * 2
    content = "".join(json.dumps(row) + "\n" for row in (rows[0], {**rows[1], "dialogue_id": 7}))
    (tmp_path / "my-dialogues.jsonl").write_text(content, encoding="utf-8")
    execute(PROGRAMS[1], tmp_path)
    found = [(each.dialogue_id, each.conversation_id) for each in dialogues_of(tmp_path / "both-sides.jsonl")]
    assert found == [(f"{name}{side}", name) for name in ("line-1", "7") for side in ("", "-partner")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


def valid_line(animal: str) -> str:
    turns = [{"speaker": "partner", "text": "any pets ?"}, {"speaker": "self", "text": f"a {animal} ."}]
    return json.dumps({"persona": [f"i have a {animal} ."], "turns": turns}) + "\n"


@pytest.mark.parametrize(("title", "alone", "content", "message"), MISTAKES, ids=[title for title, *_ in MISTAKES])
def test_mistakes_print_the_messages_on_the_page(title, alone, content, message, base, tmp_path, monkeypatch, capsys):
    """Each mistake is in a file with valid dialogues too, unless the page says it is alone."""
    monkeypatch.chdir(tmp_path)
    others = "" if alone else "".join(map(valid_line, ANIMALS))
    Path("my-dialogues.jsonl").write_text(content + others, encoding="utf-8")
    write_config(Path("config.yaml"), base, Path("my-dialogues.jsonl"), Path("run"))
    status = preprocess.main(["--config", "config.yaml"])
    printed = capsys.readouterr()
    if message.startswith("preprocess.py: "):
        assert (status, printed.err) == (1, message)
        assert not Path("run/dataset").exists()
    else:
        assert status == 0, printed.err
        # The split they are counted in depends on the seed.
        for line in message.splitlines():
            assert line in printed.out.splitlines()


def test_three_files_are_the_splits_and_two_are_split_as_the_page_says(base, tmp_path, capsys):
    """With three files, personas may repeat; without a test file, validation is the test set."""
    (tmp_path / "data").mkdir()
    config = write_config(tmp_path / "config.yaml", base, tmp_path / "data", tmp_path / "run")
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(valid_line("dog"), encoding="utf-8")
    assert preprocess.main(["--config", str(config)]) == 0
    assert "1 of the 1 personas of test are in train too" in capsys.readouterr().out
    (tmp_path / "data" / "test.jsonl").unlink()
    (tmp_path / "data" / "train.jsonl").write_text("".join(map(valid_line, ANIMALS)), encoding="utf-8")
    assert preprocess.main(["--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if "the source's" in line or "cut" in line}
    assert rows["test"].endswith("the source's validation") and rows["validation"].endswith("cut from train")
