"""generate.py through its command line: which rows, in which order, again, after a kill, and with other bases."""

from __future__ import annotations

import json

import numpy as np
import pytest
from make_models import words, write_config, write_corpus
from scripts import rows_in

import generate
import preprocess
import train
from kestrel.data.dataset import load_split


def test_rows_are_in_the_datasets_order_and_recorded(trained, tmp_path):
    arguments = trained.copy_to(tmp_path / "run")
    assert generate.main([*arguments, "--generation.candidates", "true"]) == 0
    made = tmp_path / "run" / "generations"
    adapter, base = rows_in(made / "test.adapter.jsonl"), rows_in(made / "test.base.jsonl")
    dataset = load_split(trained.run / "dataset", "test", "")
    turns = [(row["dialogue_id"], i) for row in dataset for i, t in enumerate(row["turns"]) if t["speaker"] == "self"]
    for rows in (adapter, base):
        assert [(row["dialogue_id"], row["turn"]) for row in rows] == turns
        assert {"persona", "history", "reference", "response", "stopped_by", "response_tokens"} < rows[0].keys()
        assert all(len(row["candidate_nll"]) == 2 for row in rows)
    assert [row["reference"] for row in adapter] == [row["reference"] for row in base]
    assert all(a["reference_nll"] < b["reference_nll"] for a, b in zip(adapter, base, strict=True))
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["generations"].keys() == {"test.adapter.jsonl", "test.base.jsonl"}
    assert manifest["generations"]["test.adapter.jsonl"]["made_from"]["adapter"]
    assert sorted(path.name for path in made.iterdir()) == ["manifest.json", "test.adapter.jsonl", "test.base.jsonl"]


def test_the_same_command_again_writes_nothing_and_another_does(trained, tmp_path, capsys):
    arguments = [*trained.copy_to(tmp_path / "run"), "--generation.systems", "adapter"]
    assert generate.main([*arguments, "--generation.max_dialogues", "1"]) == 0
    path = tmp_path / "run" / "generations" / "test.adapter.jsonl"
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert {row["dialogue_id"] for row in rows_in(path)} == {
        load_split(trained.run / "dataset", "test", "")[0]["dialogue_id"]
    }
    capsys.readouterr()
    assert generate.main([*arguments, "--generation.max_dialogues", "1"]) == 0
    assert "up to date" in capsys.readouterr().out and path.stat().st_mtime_ns == stamp
    assert generate.main(arguments) == 0
    assert path.read_bytes().startswith(first) and len(path.read_bytes()) > len(first)
    path.write_bytes(first[:-20])  # edited by somebody
    assert generate.main(arguments) == 0
    assert rows_in(path)[0] == json.loads(first.splitlines()[0])


def test_batching_changes_nothing_and_sampling_seed_does(trained, tmp_path):
    arguments = [*trained.copy_to(tmp_path / "run"), "--generation.systems", "adapter"]
    path = tmp_path / "run" / "generations" / "test.adapter.jsonl"

    def made(*more: str) -> list[dict]:
        path.unlink(missing_ok=True)
        assert generate.main([*arguments, *more]) == 0
        return rows_in(path)

    one, many = made("--generation.tokens_per_step", "1"), made()
    for a, b in zip(one, many, strict=True):
        assert a["response"] == b["response"] and a["reference_nll"] == pytest.approx(b["reference_nll"], rel=1e-4)
    sampling = ["--generation.do_sample", "true", "--generation.temperature", "1.5"]
    drawn = [row["response"] for row in made(*sampling)]
    assert drawn == [row["response"] for row in made(*sampling)]
    assert drawn != [row["response"] for row in many]


def test_replies_cut_from_the_dataset_are_answered_too(trained, tmp_path, capsys):
    """The dataset holds only the last exchanges; the file holds every reply but the one that fits into no prompt."""
    write_corpus(tmp_path / "corpus", 8)
    persona = ["i have a cat .", "my favorite food is rice .", "i live in lima ."]
    huge = [{"speaker": "partner", "text": "hi " * 200}, {"speaker": "self", "text": "hi ."}]
    with open(tmp_path / "corpus" / "test.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"dialogue_id": "long", "persona": persona, "turns": words(persona) * 2}) + "\n")
        file.write(json.dumps({"dialogue_id": "huge", "persona": persona, "turns": huge + words(persona)}) + "\n")
    config = write_config(tmp_path / "c.yaml", trained.base, tmp_path / "corpus", tmp_path / "run")
    arguments = ["--config", str(config), "--prompt.max_length", "90", "--training.max_steps", "1"]
    assert preprocess.main(arguments) == 0 and train.main(arguments) == 0 and generate.main(arguments) == 0
    dataset = load_split(tmp_path / "run" / "dataset", "test", "")
    in_sequence = sum(len(row["reply_spans"]) for row in dataset)
    in_dialogue = sum(turn["speaker"] == "self" for row in dataset for turn in row["turns"])
    rows = rows_in(tmp_path / "run" / "generations" / "test.adapter.jsonl")
    assert in_sequence < len(rows) == in_dialogue - 1
    assert f"1 of {in_dialogue} replies are left out" in capsys.readouterr().out
    assert [row["turn"] for row in rows if row["dialogue_id"] == "long"] == [1, 3, 5, 7, 9, 11]
    assert [row["turn"] for row in rows if row["dialogue_id"] == "huge"] == [3, 5, 7]
    assert all(np.isfinite(row["reference_nll"]) and row["reference_tokens"] > 1 for row in rows)
