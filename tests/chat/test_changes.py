"""Answers that are made again, changed and continued; other conversations, personas and adapters."""

from __future__ import annotations

import re

from chat_page import AS_PERSONA, GREEDY
from scripts import rows_in

import train
from kestrel.data.dataset import load_split


def test_turns_are_answered_again_changed_and_continued(talk, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "abcde"]
    short = [*AS_PERSONA, "--generation.max_new_tokens", "2"]
    printed = talk(
        "hi !", "and ?", "/set max_new_tokens 2", "/retry", "/tokens", f"/save {files[0]}", "/set max_new_tokens 12",
        "/continue", f"/save {files[1]}", "/edit what do you eat ?", f"/save {files[2]}", "/edit 2 i am fine .", "/history",
        f"/save {files[3]}", "/edit 9 x", "/continue", more=[*short, "--generation.do_sample", "--generation.top_k", "1"],
    )  # fmt: skip
    cut, whole, changed, own = (rows_in(file)[0]["turns"] for file in files[:4])
    assert [turn["text"] for turn in cut[::2]] == ["hi !", "and ?"] and cut[3]["stopped_by"] == "length"
    assert "(cut at max_new_tokens; /continue goes on)" in printed and re.search(
        r"of at most [\d,]+ tokens, answer \d+\)", printed
    )
    assert (
        whole[:3] == cut[:3]
        and whole[3]["text"].startswith(cut[3]["text"])
        and len(whole[3]["text"]) > len(cut[3]["text"])
    )
    assert changed[:2] == cut[:2] and changed[2]["text"] == "what do you eat ?" and len(changed) == 4
    assert [turn["text"] for turn in own] == ["hi !", "i am fine ."] and "  2 adapter> i am fine ." in printed
    assert "name a turn from 1 to 2" in printed
    loaded = talk(
        f"/load {files[1]}", "more ?", f"/save {files[1]}", "/load nothing.jsonl", more=["--load", str(files[3])]
    )
    assert "1 you> hi !\n  2 adapter> i am fine ." in loaded and "nothing.jsonl holds no conversation" in loaded
    assert rows_in(files[1])[0]["turns"][:4] == whole and len(rows_in(files[1])[0]["turns"]) == 6
    same = "the likeliest answer stays the same"
    assert same in talk("hi !", "/retry") and "nothing was said yet" in talk("/retry")
    again = talk("hi !", f"/save {files[4]}", "/edit 2 i am fine .", "/retry")
    assert same not in again and again.count(f"adapter> {rows_in(files[4])[0]['turns'][1]['text']}\n") == 2


def test_answers_are_sampled_unless_something_else_is_asked_for(talk):
    assert "Answers: sampled, temperature 0.7, top_p 0.9, at most 9 tokens;" in talk(
        more=[*AS_PERSONA, "--generation.max_new_tokens", "9"]
    )
    assert "Answers: the likeliest tokens" in talk(more=[*AS_PERSONA, "--generation.num_beams", "1"])


def test_personas_are_saved_by_name_and_dialogues_are_chosen(talk, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    printed = talk(
        "/keep me",
        "/keep no/name",
        "/persona i am other .|",
        "/dialogue test-2",
        "/persona me",
        "/dialogue x",
        "/dialogue",
    )
    assert (tmp_path / "kestrel" / "personas" / "me.txt").read_text() == "i have a dog .\ni live in rome .\n"
    row = next(row for row in load_split(trained.run / "dataset", "test", "") if row["dialogue_id"] == "test-2")
    assert "persona:\n  " + "\n  ".join(row["persona"]) in printed and "'no/name' is no name" in printed
    assert (
        printed.count("persona:\n  i have a dog .\n  i live in rome .\n") == 2 and "test has no dialogue 'x'" in printed
    )
    assert "persona:\n  i have a dog ." in talk(more=["--persona", "me"])


def test_another_adapter_answers(talk, trained, prepared, tmp_path, capsys):
    other = tmp_path / "run"
    assert train.main([*prepared.copy_to(other), "--training.max_steps", "2"]) == 0
    capsys.readouterr()
    file = tmp_path / "x.jsonl"
    printed = talk("hi !", f"/adapter {other / 'adapter'}", "/reset", "hi !", f"/save {file}", "/adapter nowhere")
    assert "(proven: it computes what the trained adapter did" in printed and "no such folder" in printed
    alone = tmp_path / "y.jsonl"
    talk("hi !", f"/save {alone}", more=[*AS_PERSONA, *GREEDY, "--model.adapter", str(other / "adapter")])
    assert rows_in(file)[0]["turns"] == rows_in(alone)[0]["turns"]
