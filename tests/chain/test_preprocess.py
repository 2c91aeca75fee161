"""preprocess.py through its command line, on miniature sources in their published layouts."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import make_tokenizers as make
import pytest
from children import python, start
from make_models import make_config
from scripts import write_rows
from transformers import AutoTokenizer

import preprocess
from kestrel.config.resolve import resolve
from kestrel.config.settings import Model
from kestrel.data.dataset import load_split, open_dataset, print_rows
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer, tokenizer_fingerprint

WORDS = ["i", "like", "dogs", "cats", "cars", "music", "the", "sea", "and", "two", "old", "books", "you", "how", "what"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make.falcon_like().save_pretrained(str(folder))
    return folder


class Conversation:
    """Five sentences of persona and three exchanges, different for each number."""

    def __init__(self, number: int):
        rng = random.Random(number)

        def say() -> str:
            return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 7)))

        self.persona = [f"{say()} {number} ." for _ in range(3)]
        self.exchanges = [(say(), f"{say()} ,  {say()} .") for _ in range(3)]


def parlai(conversations: list[Conversation], path: Path) -> None:
    lines = []
    for each in conversations:
        said = [f"your persona: {text}" for text in each.persona] + [f"{a}\t{b}" for a, b in each.exchanges]
        lines += [f"{number} {text}" for number, text in enumerate(said, 1)]
    path.write_text("\n".join(lines) + "\n")


def huggingface(conversations: list[Conversation], path: Path) -> None:
    def row(each: Conversation) -> dict:
        history, utterances = [], []
        for question, answer in each.exchanges:
            history.append(question)
            utterances.append({"candidates": ["no idea .", answer], "history": list(history)})
            history.append(answer)
        return {"personality": each.persona, "utterances": utterances}

    half = len(conversations) // 2
    rows = list(map(row, conversations))
    path.write_text(json.dumps({"train": rows[:half], "valid": rows[half:]}))


def kestrel(conversations: list[Conversation], path: Path) -> None:
    rows = []
    for each in conversations:
        said = [
            (speaker, text) for pair in each.exchanges for speaker, text in zip(("partner", "self"), pair, strict=True)
        ]
        rows.append({"persona": each.persona, "turns": [{"speaker": who, "text": text} for who, text in said]})
    write_rows(path, rows)


WRITERS = {"parlai": parlai, "huggingface": huggingface, "kestrel": kestrel}
SUFFIX = {"parlai": "txt", "huggingface": "json", "kestrel": "jsonl"}


def source(folder: Path, format: str, count: int = 24) -> Path:
    path = folder / f"{format}.{SUFFIX[format]}"
    WRITERS[format]([Conversation(number) for number in range(count)], path)
    return path


def config(folder: Path, base: Path, source: Path) -> list[str]:
    path = folder / "experiment.yaml"
    path.write_text(f"run_dir: {folder / 'run'}\ndata:\n  source: {source}\nmodel:\n  name: {base}\n")
    return ["--config", str(path)]


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("format", WRITERS)
def test_each_format_becomes_a_dataset(
    format: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = config(tmp_path, base, source(tmp_path, format))
    assert preprocess.main(argv) == 0
    shown = capsys.readouterr()
    settings, _ = resolve(argv[1], {})
    prompt = Prompt(load_tokenizer(settings.model), "plain", settings.prompt.max_length)
    folder, manifest = open_dataset(settings, prompt, "x")
    splits = {split: list(load_split(folder, split, "x")) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 24 and all(splits.values())
    assert manifest["made_from"]["format"] == format and f"is {format}, with train" in shown.out
    personas = {split: {tuple(row["persona"]) for row in rows} for split, rows in splits.items()}
    assert not personas["train"] & personas["validation"] and not personas["train"] & personas["test"]
    assert manifest["counts"] == {name: sum(len(row["reply_spans"]) for row in rows) for name, rows in splits.items()}
    assert sum(manifest["counts"].values()) == 24 * 3
    described = json.loads((folder / "statistics.json").read_text())
    for split, rows in splits.items():
        assert described["splits"][split]["dialogues"] == described["corpus"][split]["read"] == len(rows)
        assert f"{split:<11}{len(rows):>10,}{3 * len(rows):>9,}" in shown.out
    assert ("the source's validation" in shown.out) == (format == "huggingface")
    if format == "huggingface":
        assert all(len(row["candidates"]) == 3 and row["candidates"][0] == ["no idea ."] for row in splits["test"])
    assert f"wrote {folder}" in shown.out and shown.err == ""


def test_show_prints_what_is_supervised(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*config(tmp_path, base, source(tmp_path, "kestrel")), "--show", "2"]
    assert preprocess.main(argv) == 0
    plain = capsys.readouterr().out.partition("wrote ")[2]
    assert plain.count("── ") == 2 and "\033[" not in plain and plain.count("<|endoftext|>]") == 6
    rows = load_split(tmp_path / "run" / "dataset", "train", "x")
    row = rows[0]
    told, supervised = len(row["input_ids"]), sum(label != -100 for label in row["labels"])
    assert f"{row['dialogue_id']}: {told} tokens, {supervised} supervised" in plain
    assert "Persona: " + " ".join(row["persona"]) in plain
    for turn in row["turns"]:
        text = " ".join(turn["text"].split())
        assert (f"You:[ {text}<|endoftext|>]" if turn["speaker"] == "self" else f"Partner: {text}") in plain

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_rows(rows, Prompt(make.falcon_like(), "plain", 1024), 2)
    coloured = capsys.readouterr().out
    assert coloured.count("\033[32m") == coloured.count("\033[0m") == 6
    assert coloured.replace("\033[32m", "[").replace("\033[0m", "]").strip() in plain
    monkeypatch.setenv("NO_COLOR", "1")
    print_rows(rows, Prompt(make.falcon_like(), "plain", 1024), 99)
    assert "\033[" not in capsys.readouterr().out


def one_dialogue(folder: Path) -> Path:
    return source(folder, "kestrel", count=1)


def no_test(folder: Path) -> Path:
    for split in ("train", "validation"):
        write_rows(folder / "splits" / f"{split}.jsonl", [json.loads(one_dialogue(folder).read_text())])
    return folder / "splits"


def empty(folder: Path) -> Path:
    (path := folder / "empty.jsonl").write_text("")
    return path


def nowhere(folder: Path) -> Path:
    return folder / "nowhere.jsonl"


def too_long(folder: Path) -> Path:
    turns = [{"speaker": "partner", "text": "hi"}, {"speaker": "self", "text": "dogs " * 3000}]
    rows = [{"persona": [f"i am {number}"], "turns": turns} for number in range(24)]
    return write_rows(folder / "long.jsonl", rows)


def broken(folder: Path) -> Path:
    path = source(folder, "kestrel")
    with path.open("a") as file:
        file.write('{"persona": ["a"], "turns": [\n')
    return path


@pytest.mark.parametrize(
    ("make_source", "extra", "status", "message"),
    [
        (one_dialogue, [], 1, "too few conversations (1) to cut test and validation"),
        (empty, [], 1, "empty.jsonl"),
        (nowhere, [], 1, "nowhere.jsonl"),
        (broken, [], 1, "kestrel.jsonl:25"),
        (too_long, [], 1, "is left for train (22: longer than prompt.max_length); raise prompt.max_length"),
        (one_dialogue, ["--data.test_fraction", "0"], 1, "too few conversations (1) to cut validation"),
        (one_dialogue, ["--data.test_fraction", "0", "--data.validation_fraction", "0"], 1, "has no validation split"),
        (no_test, ["--data.validation_fraction", "0"], 1, "so that its validation split is the test set, and"),
        (one_dialogue, ["--data.test_fraction", "1"], 2, "--data.test_fraction: input should be less than 1"),
        (one_dialogue, ["--prompt.format", "chat"], 1, "no chat template; use prompt.format: plain"),
        (one_dialogue, ["--model.name", "/nowhere/base"], 1, "model.name '/nowhere/base'"),
        (one_dialogue, ["--show", "some"], 2, "--show: expected a number of dialogues, 0 or more, found 'some'"),
        (one_dialogue, ["--show", "-3"], 2, "--show: expected a number of dialogues, 0 or more, found '-3'"),
    ],
)
def test_mistakes_end_with_a_message_and_keep_the_dataset(
    tmp_path: Path, base: Path, make_source, extra: list[str], status: int, message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = config(tmp_path, base, source(tmp_path, "parlai"))
    assert preprocess.main(before) == 0
    whole = digest(tmp_path / "run" / "dataset")
    capsys.readouterr()
    assert preprocess.main([*config(tmp_path, base, make_source(tmp_path)), *extra]) == status
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("preprocess.py: ")
    assert "Traceback" not in shown.err and "unexpected" not in shown.err
    assert digest(tmp_path / "run" / "dataset") == whole, "the old dataset stays"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.yaml", "dataset"]


def test_a_file_in_the_place_of_the_dataset_stays(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = config(tmp_path, base, source(tmp_path, "parlai"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dataset").write_text("my notes")
    assert preprocess.main(argv) == 1
    assert f"{tmp_path / 'run' / 'dataset'} is a file where a folder is needed" in capsys.readouterr().err
    assert (tmp_path / "run" / "dataset").read_text() == "my notes"


def test_torch_is_not_imported() -> None:
    """The quickstart's dataset is made without torch, which takes longer to import than the dataset takes to make."""
    code = (
        "import sys, preprocess, tempfile\n"
        "run = tempfile.mkdtemp()\n"
        "assert preprocess.main(['--config', 'configs/quickstart.yaml', '--run_dir', run, '--show', '1']) == 0\n"
        "print('imported:', sorted({'torch', 'peft', 'accelerate'} & set(sys.modules)))\n"
        "from transformers import AutoTokenizer\n"
        "AutoTokenizer.from_pretrained('quickstart/base')\n"
        "print('torch' in sys.modules)\n"
    )
    imported, by_library = python("-c", code).stdout.splitlines()[-2:]
    assert imported == "imported: []"
    assert by_library == "True", "transformers no longer imports torch: kestrel.prompt.tokenizer can be simplified"


@pytest.mark.parametrize("architecture", ["falcon", "llama", "gpt_neox", "gpt2"])
def test_the_tokenizer_is_the_one_that_transformers_chooses(architecture: str, tmp_path: Path) -> None:
    make_config(architecture).save_pretrained(tmp_path)
    make.falcon_like().save_pretrained(str(tmp_path))
    ours, theirs = load_tokenizer(Model(name=str(tmp_path))), AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(ours) is type(theirs) and ours.init_kwargs == theirs.init_kwargs | {"local_files_only": False}
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)
    assert Prompt(ours, "plain", 100).identity() == Prompt(theirs, "plain", 100).identity()


def test_without_test_split(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody who trains on everything and generates elsewhere."""
    argv = [*config(tmp_path, base, source(tmp_path, "parlai")), "--data.test_fraction", "0"]
    assert preprocess.main(argv) == 0
    assert "\ntest" not in capsys.readouterr().out
    assert not (tmp_path / "run" / "dataset" / "test").exists()


def test_text_that_spells_control_tokens_trains_none(tmp_path: Path, base: Path) -> None:
    texts = {"partner": ">>TITLE<< <|endoftext|>\nYou: hi", "self": "<|endoftext|>"}
    turns = [{"speaker": speaker, "text": text} for speaker, text in texts.items()]
    rows = [{"persona": [f"<|endoftext|> {number}"], "turns": turns} for number in range(24)]
    assert preprocess.main(config(tmp_path, base, write_rows(tmp_path / "nasty.jsonl", rows))) == 0
    for row in load_split(tmp_path / "run" / "dataset", "train", "x"):
        assert [index for index in row["input_ids"] if index <= 11] == [11] and row["input_ids"][-1] == 11
    show = make.falcon_like().decode(row["input_ids"])
    assert "\nPartner: >>TITLE<< <|endoftext|> You: hi\nYou: <|endoftext|><|endoftext|>" in show


def test_two_processes_and_folders_make_the_same_bytes(tmp_path: Path, base: Path) -> None:
    argv = config(tmp_path, base, source(tmp_path, "parlai"))
    other = start("preprocess.py", *argv, "--run_dir", str(tmp_path / "other"))
    assert preprocess.main(argv) == 0
    _, errors = other.communicate()
    assert other.returncode == 0, errors
    one, two = (digest(tmp_path / name / "dataset") for name in ("run", "other"))
    one.pop("manifest.json"), two.pop("manifest.json")
    assert len(one) == 10 and one == two
    # The manifest names the checkout as well, and somebody may commit while a test runs.
    manifests = [json.loads((tmp_path / name / "dataset" / "manifest.json").read_text()) for name in ("run", "other")]
    assert manifests[0] | {"git_commit": ""} == manifests[1] | {"git_commit": ""}


def run_on(tmp_path: Path, tokenizer, rows: list[dict], *options: str) -> list[str]:
    tokenizer.save_pretrained(str(tmp_path / "base"))
    write_rows(tmp_path / "data.jsonl", rows)
    return [*config(tmp_path, tmp_path / "base", tmp_path / "data.jsonl"), *options]


def test_what_a_tokenizer_cannot_spell_is_counted_and_its_script_named(tmp_path, capsys):
    turns = [{"speaker": "partner", "text": "hi"}, {"speaker": "self", "text": "two dogs"}]
    rows = [{"persona": ["i have two dogs"], "turns": turns} for _ in range(9)]
    assert preprocess.main(run_on(tmp_path, make.wordpiece(), rows)) == 0
    assert "unknown" not in capsys.readouterr().out
    for row in rows:
        row["turns"] = [turns[0], {"speaker": "self", "text": "我养蜜蜂 🙂"}]
    assert preprocess.main(run_on(tmp_path, make.wordpiece(), rows)) == 0
    said = capsys.readouterr().out
    assert "train: 35 unknown tokens" in said and "it cannot spell CJK, so take a model that can" in said
    train = json.loads((tmp_path / "run" / "dataset" / "statistics.json").read_text())["splits"]["train"]
    assert train["unknown_characters"] == dict.fromkeys("我养蜜蜂🙂", 7) and train["unknown_tokens"] == 35


def test_line_breaks_reach_the_model_or_it_is_said(tmp_path, capsys):
    said = [("system", "i keep bees .\n\nby a lake ."), ("user", "hi"), ("assistant", "two\nlines")]
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in said]} for n in range(9)]
    argv = run_on(tmp_path, make.byte_level(), rows)
    assert preprocess.main(argv) == 0
    assert "train: 14 texts of several lines, which prompt.format plain writes in one" in capsys.readouterr().out
    assert preprocess.main([*argv, "--prompt.format", "chat", "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "answers end at the first line break unless you set generation.stop_strings: []" in shown
    assert "i keep bees .\n\nby a lake ." in shown and "two\nlines" in shown
    assert preprocess.main([*argv, "--prompt.format", "chat", "--generation.stop_strings"]) == 0
    assert "several lines" not in capsys.readouterr().out


def test_a_chat_log_is_cut_by_dialogue_and_the_table_says_what_no_test_can_tell(tmp_path, base, capsys):
    log = "".join(
        f"0{day}/12/24, 10:0{at} - {name}: day {day}\n"
        for day in range(1, 10)
        for at, name in enumerate(("Ben", "Ana"))
    )
    (tmp_path / "chat.txt").write_text(log)
    argv = [*config(tmp_path, base, tmp_path / "chat.txt"), "--data.self", "Ana", "--data.persona", "i am ana ."]
    assert preprocess.main(argv) == 0
    said = capsys.readouterr().out
    assert "cut from train by dialogue" in said
    assert (
        "1 of the 1 personas of test are in train too: no score can tell how the model answers as somebody new" in said
    )
