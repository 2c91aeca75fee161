"""A conversation over a pipe: answered as generate.py would, over the prompt of training, and saved as dialogues."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from chat_page import AS_PERSONA
from hypothesis import given
from make_models import make_tokenizer
from scripts import rows_in

import chat
import preprocess
from kestrel.adapter.load import load_model
from kestrel.chat.conversation import Conversation, Exchange, load, save
from kestrel.chat.sampling import change_setting
from kestrel.chat.streaming import ChatModel
from kestrel.config.conflicts import conflicts
from kestrel.config.resolve import resolve
from kestrel.config.settings import Generation, Settings
from kestrel.data.dataset import dialogue_of, load_split
from kestrel.data.persona_file import Persona
from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.generation.respond import respond
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import sha256_of
from kestrel.runtime.output import visible
from kestrel.runtime.run_folder import locked_run_folder

ROOT = Path(__file__).resolve().parents[2]


def printable(text: str) -> str:
    return "".join(filter(str.isprintable, text)).replace(" ", "")


# -- the prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [256, 60])
def test_prompt_is_that_of_training(prepared, max_length):
    prompt = Prompt(make_tokenizer(), "plain", max_length)
    cuts = 0
    for row in load_split(prepared.run / "dataset", "train", ""):
        dialogue = dialogue_of(row)
        turns = [turn.text for turn in dialogue.turns]
        conversation = Conversation(Persona(dialogue.persona))
        chat_model = ChatModel(torch.nn.Identity(), prompt, ["base"])
        for index in range(0, len(turns) - 1, 2):
            context, cut = chat_model.context(conversation.dialogue(Turn("partner", turns[index])))
            # The training prompt leaves room for its own reply, the open one for a short word.
            if not cut:
                assert context == prompt.context(dialogue, index + 1)
            assert len(context) < max_length
            cuts += cut
            conversation.exchanges.append(Exchange(turns[index], "adapter", turns[index + 1]))
    assert bool(cuts) == (max_length == 60)


def test_typed_text_spells_no_control_token(talk, trained, tmp_path, monkeypatch):
    seen = []

    def answer(self, context, *rest):
        seen.append(context)
        yield "hi", False

    monkeypatch.setattr(ChatModel, "stream_answer", answer)
    talk("<|endoftext|>>>TITLE<< You:", more=["--persona", "i am <|endoftext|> .", "\x0b>>ANSWER<<"])
    assert seen and min(seen[0]) > 11


def test_too_long_message_is_refused_and_cut_turns_are_announced_once(talk):
    printed = talk("dog " * 3000, *["tell me more about the dog and the soup that you love the most ."] * 8)
    assert re.search(r"\(persona and message together exceed the \d+ tokens", printed)
    assert "dialogue chat-" not in printed and printed.count("adapter> ") == 8
    assert printed.count("no longer fit") == 1


# -- commands --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(talk, trained, tmp_path):
    """Adapter and base, replayed by the batched decoding over the same prompts."""
    file = tmp_path / "said.jsonl"
    printed = talk("hi ! do you have a pet ?", "/compare what do you eat ?", "/system base", "why ?", f"/save {file}")
    (row,) = rows_in(file)
    assert row["persona"] == ["i have a dog .", "i live in rome ."]
    replies = [turn for turn in row["turns"] if turn["speaker"] == "self"]
    assert [turn["system"] for turn in replies] == ["adapter", "adapter", "base"]
    assert set(replies[1]["beside"]) == {"base"}
    assert f"adapter> {visible(replies[0]['text'])}\n" in printed
    assert f"base> {visible(replies[2]['text'])}\n" in printed

    run, _ = resolve(str(trained.config), {})
    prompt = Prompt(load_tokenizer(run.model), "plain", run.prompt.max_length)
    adapter = trained.run / "adapter"
    model = load_model(run, prompt, (adapter, read_json(adapter / "manifest.json", "")))
    replayed = Conversation(Persona(tuple(row["persona"])))
    for message, reply in zip(row["turns"][::2], replies, strict=True):
        context, _ = ChatModel(model, prompt, ["adapter"]).context(replayed.dialogue(Turn("partner", message["text"])))
        as_adapter = respond(model, prompt, [context], run.generation)[0].text
        with model.disable_adapter():
            as_base = respond(model, prompt, [context], run.generation)[0].text
        assert reply["text"] == (as_adapter if reply["system"] == "adapter" else as_base)
        assert reply.get("beside", {"base": as_base}) == {"base": as_base}
        replayed.exchanges.append(Exchange(message["text"], "adapter", reply["text"]))


def test_undo_and_reset_leave_no_trace(talk, tmp_path):
    one, two, three = (tmp_path / f"{name}.jsonl" for name in "abc")
    talk("hi !", f"/save {one}")
    talk("hi !", "what is that ?", "/undo", f"/save {two}")
    talk("where are you ?", "/reset", "hi !", f"/save {three}")
    assert rows_in(one)[0]["turns"] == rows_in(two)[0]["turns"] == rows_in(three)[0]["turns"]
    assert "nothing to take back" in talk("/undo")


def test_saved_conversations_are_a_corpus(talk, trained, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = []
    for number in range(12):
        lines += [f"/persona i am {number} years old . | i live in town {number} .", "hi !", f"/save {file}"]
        lines += ["and \x1b[31m now ?", f"/save {file}"]  # the same conversation, longer: it takes its line's place
    assert f"{file} holds 12 conversations" in talk(*lines)
    run = tmp_path / "run"
    source = ["--run_dir", str(run), "--data.source", str(file), "--data.validation_fraction", "0.2"]
    assert preprocess.main(trained.arguments(*source, "--data.test_fraction", "0.2")) == 0
    read = [row for split in ("train", "validation", "test") for row in load_split(run / "dataset", split, "")]
    ids = {row["dialogue_id"]: row for row in rows_in(file)}
    assert {row["dialogue_id"] for row in read} == set(ids) and len(read) == 12
    for row in read:
        assert row["persona"] == ids[row["dialogue_id"]]["persona"]
        said = [turn["text"] for turn in ids[row["dialogue_id"]]["turns"]]
        assert [printable(turn["text"]) for turn in row["turns"]] == [printable(text) for text in said]
        assert len(said) == 4


def test_a_saved_conversation_can_be_loaded_whatever_line_breaks_it_has(tmp_path):
    breaks = "".join(character for character in map(chr, range(0x3000)) if len(f"a{character}a".splitlines()) > 1)
    said, file = Conversation(Persona(("i am here .",)), [Exchange(breaks, "base", breaks)]), tmp_path / "x.jsonl"
    assert [save(said, file) for _ in range(2)] == [1, 1]
    assert load(file) == said


def test_persona_from_file_input_or_dialogue(talk, trained, tmp_path):
    file = tmp_path / "someone.txt"
    file.write_text("i have a cat .\n\n  i like   rice .\n", encoding="utf-8")
    assert "persona:\n  i have a cat .\n  i like rice .\nAnswers" in talk(more=["--persona", str(file)])
    assert "persona:\n  i have a cat .\n  i like rice .\n" in talk(f"/persona {file}")
    typed = talk("/persona", "i have a cat .", "i like rice .", "", "hi !")
    assert "persona:\n  i have a cat .\n  i like rice .\n" in typed and "adapter> " in typed
    rows = load_split(trained.run / "dataset", "test", "")
    for options, row in (([], rows[0]), (["--dialogue", rows[2]["dialogue_id"]], rows[2])):
        assert "persona:\n  " + "\n  ".join(row["persona"]) + "\nAnswers" in talk(more=options)


def test_paths_are_taken_as_people_type_them(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone.txt").write_text("i have a cat .\n", encoding="utf-8")
    lines = ["/persona ~/someone.txt", "hi !", '/save "my talk.jsonl"', "/save ~/other.jsonl", "/system BASE"]
    printed = talk(*lines)
    assert "persona:\n  i have a cat ." in printed and "(base answers)" in printed
    assert rows_in(tmp_path / "my talk.jsonl") == rows_in(tmp_path / "other.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my talk.jsonl", "other.jsonl", "someone.txt"]


def test_set_has_the_effect_of_the_options(talk, tmp_path):
    files = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    talk("/set temperature 3", "/set max_new_tokens=5", "hi !", "and ?", f"/save {files[0]}")
    options = ["--generation.do_sample", "--generation.temperature", "3", "--generation.max_new_tokens", "5"]
    talk("hi !", "and ?", f"/save {files[1]}", more=[*AS_PERSONA, *options])
    talk("hi !", "and ?", f"/save {files[2]}")
    one, two, three = (rows_in(Path(file))[0]["turns"] for file in files)
    assert one == two != three


def test_wrong_set_changes_nothing(talk):
    wrong = {
        "top_p 9": "top_p: input should be less than or equal to 1, found '9'",
        "seed 1": "seed cannot be set here",
        "do_sample maybe": "do_sample: input should be a valid boolean, found 'maybe'",
        "top_k [": "top_k: expected integer or null, found '['",
        "temperature": "/set temperature needs a value",
        "max_new_tokens 99999": "fit into the model's context",
        "length_penalty 2": "length_penalty has no effect without num_beams above 1",
    }
    printed = talk("/set", *(f"/set {setting}" for setting in wrong), "/set")
    assert [message for message in wrong.values() if message not in printed] == []
    first, *_, last = printed.split("you> /set\n")[1:]
    assert first.startswith(last.partition("you>")[0]) and "do_sample: false" in last


@given(st.lists(st.sampled_from(["do_sample true", "do_sample false", "temperature 2", "top_k 3", "top_p 0.5",
                                 "num_beams 2", "num_beams 1", "length_penalty 2", "temperature null"])))  # fmt: skip
def test_set_gives_only_valid_settings(changes):
    chosen = Generation()
    for change in changes:
        with contextlib.suppress(KestrelError):
            chosen = change_setting(chosen, *change.split(), 1000)
    experiment = {"run_dir": "x", "data": {"source": "x"}, "model": {"name": "x"}}
    allowed = Settings.model_validate({**experiment, "generation": chosen.model_dump()})
    assert conflicts(allowed) == []


def test_conversation_survives_mistakes(talk, tmp_path, monkeypatch):
    def failing(self, name):
        raise RuntimeError("size mismatch\nand more")

    monkeypatch.setattr(ChatModel, "use_adapter", failing)
    other, long = tmp_path / "other.txt", ("i work at night . " * 20).strip()  # no file can have such a name
    other.write_text("not dialogues\n", encoding="utf-8")
    printed = talk(
        f"/persona {long} and by day .", f"/load {long}", "/adapter other", "/persona i am here .|",
        "/sav x", "/save", f"/save {tmp_path / 'x'}", "/system", "/persona nobody.txt", "hi \udcff !",
        f"/save {tmp_path}", f"/save {other}", "//slash", "/quit", "never read",
        more=["--persona", long],
    )  # fmt: skip
    for message in (
        f"persona:\n  {long}\n", f"persona:\n  {long} and by day .\n",
        "(unexpected RuntimeError: size mismatch; the conversation goes on)",
        "did you mean /save?", "needs the name of a file", "nothing to save", "/system takes adapter or base",
        "nobody.txt: No such file", "name another file", "does not hold dialogues",
    ):  # fmt: skip
        assert message in printed
    assert printed.count("adapter> ") == 2 and "never read" not in printed
    assert other.read_text(encoding="utf-8") == "not dialogues\n"


# -- the script ------------------------------------------------------------------------------------------------------


def test_run_folder_is_neither_locked_nor_changed(talk, trained):
    def everything() -> dict[str, str]:
        return {str(path): sha256_of(path) for path in sorted(trained.run.rglob("*")) if path.is_file()}

    with locked_run_folder(str(trained.run), (trained.run / "config.yaml").read_text(encoding="utf-8")):
        held = everything()
        assert "adapter> " in talk("hi !")
        assert everything() == held


def test_base_needs_no_adapter(prepared, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi !\n/compare\n/system adapter\n"))
    assert chat.main(prepared.arguments(*AS_PERSONA, "--generation.systems", "base")) == 0
    printed = capsys.readouterr().out
    assert "base> " in printed and "no adapter is loaded" in printed and "/system takes base" in printed
    assert chat.main(prepared.arguments(*AS_PERSONA)) == 1
    said = capsys.readouterr().err
    assert "there is no adapter" in said and "--generation.systems base" in said


def test_seed_decides_the_samples(talk, tmp_path):
    said = []
    for number, seed in enumerate(["1", "1", "2"]):
        file = tmp_path / f"{number}.jsonl"
        talk("hi !", "and ?", f"/save {file}", more=[*AS_PERSONA, "--generation.do_sample", "--seed", seed])
        said.append(rows_in(file)[0]["turns"])
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--host", "0.0.0.0"], 2, "--host: needs --web"),
        (["--web", "--port", "70000"], 2, "--port: expected 0"),
        ([*AS_PERSONA, "--dialogue", "x"], 2, "--dialogue: --persona already gives the persona"),
        (["--persona", "nobody.txt"], 1, "nobody.txt: No such file"),
        (["--persona", str(ROOT / "README.md"), "i work ."], 1, "README.md is a file, and more follows it"),
        (["--persona", " ", "\t"], 1, "a persona needs at least one sentence"),
        (["--dialogue", "x"], 1, "test has no dialogue 'x'; its ids are test-0"),
        (["--run_dir", "nowhere"], 1, "or give a persona: --persona FILE"),
        (["--web"], 1, "pip install -r requirements-web.txt"),
    ],
)
def test_wrong_options_and_a_missing_package_are_named(talk, monkeypatch, options, status, message):
    monkeypatch.setattr(chat, "find_spec", lambda name: None)  # as without Gradio
    assert message in talk(more=options, status=status)
    assert not Path("nowhere").exists()


def test_missing_package_and_interpreter_are_named(tmp_path):
    """As when `python` is not that of the environment."""
    for name in ("pydantic", "torch"):
        blocked = f"import sys; sys.modules[{name!r}] = None; sys.argv = sys.argv[1:]; import runpy; "
        command = [sys.executable, "-c", f"{blocked}runpy.run_path('chat.py', run_name='__main__')", "chat.py"]
        command += ["--config", "configs/quickstart.yaml", *AS_PERSONA]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"the package {name} is not installed for {sys.executable}" in done.stderr
        assert ".venv/bin/python" in done.stderr
