"""Training that goes on from what was trained: a finished run with more steps, and a run that begins from an adapter."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from make_models import write_base
from scripts import script, worsen

import preprocess
import train
from kestrel.training.schedule import learning_rate_factor


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "training.jsonl").read_text(encoding="utf-8").splitlines()]


def manifest_of(run: Path) -> dict:
    return json.loads((run / "adapter" / "manifest.json").read_text(encoding="utf-8"))


def test_a_finished_run_is_extended_with_a_schedule_of_its_own(trained, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = trained.copy_to(run)
    before = log_of(run)
    more = [
        *arguments,
        "--training.max_steps",
        "14",
        "--training.learning_rate",
        "5e-3",
        "--training.warmup_ratio",
        "0",
    ]
    assert train.main(more) == 0
    said = capsys.readouterr().out
    assert "extending the run that was finished at step 8 to 14 steps" in said and "cosine, from 0.005" in said
    log = log_of(run)
    assert log[: len(before)] == before
    rates = {line["step"]: line["learning_rate"] for line in log if "loss" in line}
    cosine = [5e-3 * (1 + math.cos(math.pi * done / 6)) / 2 for done in range(6)]
    assert [rates[step] for step in range(9, 15)] == pytest.approx(cosine)
    assert max(line["step"] for line in log if "eval_loss" in line) == 14
    manifest = manifest_of(run)
    assert manifest["settings"]["training"]["steps"] == manifest["steps"] == 14
    assert [stretch["steps"] for stretch in manifest["history"]] == [8]
    assert train.main(more) == 0 and log_of(run) == log  # over
    assert train.main([*more, "--training.max_steps", "20", "--training.lr_schedule", "constant"]) == 0
    assert [stretch["steps"] for stretch in manifest_of(run)["history"]] == [8, 14]
    assert {line["learning_rate"] for line in log_of(run) if "loss" in line and line["step"] > 14} == {5e-3}
    capsys.readouterr()
    assert train.main(arguments) == 1
    assert "training.steps: it was 20, now 8" in capsys.readouterr().err


def test_an_extension_counts_its_own_evaluations_for_an_early_stop(prepared, tmp_path, monkeypatch):
    arguments = prepared.copy_to(tmp_path / "run")
    worsen(monkeypatch, after=1)
    assert train.main(arguments) == 0
    assert train.main([*arguments, "--training.max_steps", "16", "--training.early_stopping", "3"]) == 0
    evaluated = [line["step"] for line in log_of(tmp_path / "run") if "eval_loss" in line]
    assert evaluated == [0, 2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize("change", [["--training.batch_size", "2"], ["--lora.dropout", "0.5"]])
def test_an_extension_changes_nothing_but_steps_and_learning_rate(trained, tmp_path, capsys, change):
    arguments = trained.copy_to(tmp_path / "run")
    assert train.main([*arguments, "--training.max_steps", "14", *change]) == 1
    assert f"{change[0].lstrip('-')}: it was " in capsys.readouterr().err


def test_each_stretch_warms_up_and_decays():
    first = {"steps": 10, "learning_rate": 2.0, "lr_schedule": "linear", "warmup_ratio": 0.2}
    second = {"steps": 14, "learning_rate": 1.0, "lr_schedule": "cosine", "warmup_ratio": 0.0}
    alone = [learning_rate_factor(step, [first]) for step in range(11)]
    assert alone == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    both = [learning_rate_factor(step, [first, second]) for step in range(15)]
    assert both[:10] == alone[:10]
    assert both[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * done / 4)) for done in range(5)])


def test_a_run_begins_from_an_adapter(trained, prepared, tmp_path, capsys):
    """On the same dialogues with the loss that it reached, and with its shape whatever the settings say."""
    adapter, run = trained.run / "adapter", tmp_path / "run"
    more = [*prepared.copy_to(run), "--training.init_adapter", str(adapter), "--lora.r", "2"]
    assert train.main([*more, "--training.max_steps", "2"]) == 0
    said = capsys.readouterr()
    assert "proven: it computes what the trained adapter did" in said.out and "lora.r: it was 4, now 2" in said.err
    first, *_ = (line for line in log_of(run) if "eval_loss" in line)
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(manifest_of(trained.run)["eval_loss"], rel=1e-4)
    manifest = manifest_of(run)
    assert manifest["settings"]["lora"]["r"] == 4
    assert manifest["init_adapter"] == {"sha256": manifest_of(trained.run)["files"]["adapter_model.safetensors"]}
    assert script("generate").main([*more, "--generation.max_dialogues", "1", "--generation.systems", "adapter"]) == 0
    capsys.readouterr()
    assert train.main([*prepared.arguments("--run_dir", str(run)), "--training.max_steps", "2"]) == 1  # not resumed
    assert "init_adapter: it was " in capsys.readouterr().err


def test_an_initial_adapter_of_another_base_is_refused(trained, prepared, tmp_path, capsys):
    base = write_base(tmp_path / "base", seed=1)
    arguments = [*prepared.arguments("--run_dir", str(tmp_path / "run")), "--model.name", str(base)]
    assert preprocess.main(arguments) == 0
    assert train.main([*arguments, "--training.init_adapter", str(trained.run / "adapter")]) == 1
    assert "base.files.model.safetensors: it was " in capsys.readouterr().err
    shutil.copytree(trained.run / "adapter", tmp_path / "other")
    (tmp_path / "other" / "adapter_config.json").unlink()
    assert train.main([*arguments, "--training.init_adapter", str(tmp_path / "other")]) == 1
    assert "training.init_adapter" in capsys.readouterr().err


def test_runs_share_a_data_set(prepared, tmp_path, capsys):
    """Whatever their seed, and all scripts find it."""
    other = prepared.run / "dataset"
    shared = ["--data.dataset", str(other), "--seed", "5", "--training.max_steps", "2"]
    arguments = [*prepared.arguments("--run_dir", str(tmp_path / "run")), *shared]
    beside, seed = prepared.arguments("--run_dir", str(prepared.run.parent / "beside")), ["--seed", "5"]
    for script_of, more, is_named in (
        (train, seed, True),
        (script("generate"), [], True),
        (train, ["--prompt.max_length", "99"], False),
        (train, ["--prompt.labels", "About", "You", "Me"], False),
    ):
        assert script_of.main([*beside, *more]) == 1
        assert (f"add --data.dataset {other}\n" in capsys.readouterr().err) == is_named
    assert preprocess.main(arguments) == 2
    assert "data.dataset: a run with another's data set needs no preprocess.py" in capsys.readouterr().err
    assert train.main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    assert train.main(arguments) == 0
    assert (tmp_path / "run" / "dataset").resolve() == other.resolve()
    assert script("generate").main([*arguments, "--generation.max_dialogues", "2"]) == 0
    assert script("evaluate").main([*arguments, "--evaluation.resamples", "100"]) == 0
    capsys.readouterr()
    assert train.main([*arguments, "--prompt.max_length", "99"]) == 1
    said = capsys.readouterr().err
    assert "prompt.max_length: it was " in said and "name one made with these settings in data.dataset" in said
    assert train.main([*prepared.copy_to(tmp_path / "own"), *shared]) == 1
    assert "is a data set of this run's own" in capsys.readouterr().err
    assert preprocess.main(prepared.arguments("--run_dir", str(tmp_path / "run"))) == 0  # in place of the link
    assert not (tmp_path / "run" / "dataset").is_symlink() and (other / "manifest.json").exists()


def test_an_adapter_to_use_is_no_adapter_to_begin_from(prepared, capsys):
    assert train.main(prepared.arguments("--model.adapter", "x")) == 2
    assert "--model.adapter: train.py would ignore it; to begin from this adapter" in capsys.readouterr().err
