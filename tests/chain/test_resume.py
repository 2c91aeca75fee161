"""An interrupted run that is resumed ends where one that was never interrupted does, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from experiment import Experiment
from make_models import write_base
from scripts import die_after, rows_in, script, worsen

import train
from kestrel.adapter.source import WEIGHTS
from kestrel.training import callbacks, checkpoints

LONG = ["--training.max_steps", "20", "--training.evaluations", "5", "--training.logging_steps", "2"]


def results(run: Path) -> dict[str, bytes]:
    """What must not depend on interruptions."""
    names = (f"adapter/{WEIGHTS}", "logs/training.jsonl", "samples.jsonl")
    return {name: (run / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(prepared: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of LONG without an interruption; dropout is on."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*prepared.copy_to(run), *LONG]) == 0
    return results(run)


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def steps_logged(run: Path) -> int:
    log = run / "logs" / "training.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.fixture(scope="module")
def begun(prepared: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LONG that was killed in step 15; its checkpoints are of steps 8 and 12."""
    run = tmp_path_factory.mktemp("begun") / "run"
    arguments = [*prepared.copy_to(run), *LONG]
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 15)
        assert train.main(arguments) == 1
    assert names_in(run) == ["checkpoint-12", "checkpoint-8"]
    return run


def copy_of(begun: Path, prepared: Experiment, run: Path) -> list[str]:
    shutil.copytree(begun, run)
    return [*prepared.arguments("--run_dir", str(run)), *LONG]


@pytest.mark.parametrize(
    ("step", "number"), [(1, None), (5, None), (20, None), (3, signal.SIGINT), (8, signal.SIGTERM)]
)
def test_stopped_and_run_again(prepared, whole, tmp_path, monkeypatch, capsys, step, number):
    """In the first and last step and around a checkpoint: killed, or by a signal, which leaves a line in the log."""
    arguments = [*prepared.copy_to(tmp_path / "run"), *LONG]
    with monkeypatch.context() as patch:
        die_after(patch, step, number)
        assert train.main(arguments) == (128 + number if number else 1)
    stopped = f"stopped at step {step}; the same command resumes from there"
    assert (stopped in capsys.readouterr().err) == bool(number)
    assert not (tmp_path / "run" / "adapter").exists()
    assert train.main(arguments) == 0
    same = [f"adapter/{WEIGHTS}"] if number else list(whole)
    assert [name for name in same if results(tmp_path / "run")[name] != whole[name]] == []


def test_two_signals_stop_at_once(prepared, tmp_path, monkeypatch, capfd):
    arguments = [*prepared.copy_to(tmp_path / "run"), *LONG]
    own = callbacks.Guard.on_pre_optimizer_step

    def twice(self, args, state, control, **extra):
        own(self, args, state, control, **extra)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(callbacks.Guard, "on_pre_optimizer_step", twice)
    monkeypatch.setattr(os, "_exit", leave)  # which would end the tests
    with pytest.raises(SystemExit, match="130"):
        train.main(arguments)
    assert "stopped at once" in capfd.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", [*FILES, "adapter_config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(prepared, begun, tmp_path, capsys, name, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(begun / "checkpoints", folder)
    meaning = json.loads((folder / "checkpoint-12" / "manifest.json").read_text())["settings"]
    damaged = folder / "checkpoint-12" / name
    content = damaged.read_bytes()
    if damage == "missing":
        damaged.unlink()
    elif damage == "truncated":
        damaged.write_bytes(content[: len(content) // 2])
    else:
        damaged.write_bytes(bytes([content[0] ^ 4]) + content[1:])
    assert checkpoints.choose("auto", folder, meaning, "python train.py")[0] == folder / "checkpoint-8"
    said = capsys.readouterr()
    assert "warning: " in said.err and "checkpoint-12" in said.err
    assert "resuming from" in said.out and "checkpoint-8" in said.out
    assert damaged.parent.exists(), "only a training that really starts deletes checkpoints"
    checkpoints.remove_newer(folder, 8)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-8"]


@pytest.mark.parametrize(
    ("damaged", "used"), [([], "checkpoint-12"), (["checkpoint-12"], "checkpoint-8"), (["checkpoint-8", "checkpoint-12"], "")]
)  # fmt: skip
def test_the_newest_sound_checkpoint_is_used_and_the_result_is_the_same(
    prepared, begun, whole, tmp_path, capsys, damaged, used
):
    arguments = copy_of(begun, prepared, tmp_path / "run")
    for name in damaged:
        (tmp_path / "run" / "checkpoints" / name / "optimizer.pt").write_bytes(b"")
    assert train.main(arguments) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == said.err.count("is damaged or was edited") == len(damaged)
    assert ("resuming from" in said.out) == bool(used) and used in said.out
    assert results(tmp_path / "run") == whole


def test_a_checkpoint_whose_best_one_is_damaged_is_not_used(prepared, tmp_path, monkeypatch, capsys):
    """The best adapter may have to come from there in the end; without it the last one would be taken in silence."""
    arguments = [*prepared.copy_to(tmp_path / "run"), "--training.max_steps", "12", "--training.evaluations", "3"]
    with monkeypatch.context() as patch:
        worsen(patch, after=1)
        die_after(patch, 11)
        assert train.main(arguments) == 1
    assert names_in(tmp_path / "run") == ["checkpoint-4", "checkpoint-8"]
    (tmp_path / "run" / "checkpoints" / "checkpoint-4" / WEIGHTS).write_bytes(b"damaged")
    capsys.readouterr()
    assert train.main(arguments) == 0
    said = capsys.readouterr()
    assert "checkpoint-8 needs it and is skipped" in said.err and "resuming from" not in said.out


def test_early_stopping_counts_across_an_interruption(prepared, tmp_path, monkeypatch):
    arguments = ["--training.max_steps", "20", "--training.evaluations", "10", "--training.early_stopping", "2"]
    for name, calls in (("whole", [(2, None)]), ("interrupted", [(2, 7), (-2, None)])):
        command = [*prepared.copy_to(tmp_path / name), *arguments]
        for better, until in calls:
            with monkeypatch.context() as patch:
                worsen(patch, after=better)
                if until:
                    die_after(patch, until)
                assert train.main(command) == (1 if until else 0)
    assert results(tmp_path / "whole") == results(tmp_path / "interrupted")
    assert steps_logged(tmp_path / "whole") == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora.alpha", "9"), ("lora.r", "8"), ("lora.dropout", "0.2"), ("training.weight_decay", "0.1"),
        ("training.learning_rate", "2e-2"), ("training.batch_size", "5"), ("training.max_steps", "21"),
        ("quantization.double_quant", "false"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(prepared, begun, tmp_path, capsys, field, value):
    assert train.main([*copy_of(begun, prepared, tmp_path / "run"), f"--{field}", value]) == 1
    said = capsys.readouterr().err
    assert f"{field.replace('max_', '')}: it was " in said and "--training.resume never" in said
    assert names_in(tmp_path / "run") == ["checkpoint-12", "checkpoint-8"]


def test_a_checkpoint_of_other_data_or_another_base_is_refused(prepared, begun, tmp_path, capsys):
    import preprocess

    arguments = copy_of(begun, prepared, tmp_path / "run")
    fewer = [*arguments, "--data.max_dialogues", "12"]
    assert preprocess.main(fewer) == 0
    assert train.main(fewer) == 1
    assert "dataset: it was " in capsys.readouterr().err
    assert preprocess.main(arguments) == 0
    other = [*arguments, "--model.name", str(write_base(tmp_path / "other", seed=1))]
    assert train.main(other) == 1
    assert "base.files.model.safetensors: it was " in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [["--training.logging_steps", "1"], ["--training.tokens_per_step", "300"], ["--training.samples", "0"]]
)
def test_settings_that_do_not_affect_the_weights_may_change(prepared, begun, tmp_path, capsys, change):
    assert train.main([*copy_of(begun, prepared, tmp_path / "run"), *change]) == 0
    assert "checkpoint-12" in capsys.readouterr().out
    logged = [line["step"] for line in rows_in(tmp_path / "run" / "logs" / "training.jsonl") if "loss" in line]
    assert logged[-8:] == list(range(13, 21)) or "logging_steps" not in change[0]


def test_resume_never_and_resume_from_a_named_checkpoint(prepared, begun, whole, tmp_path, monkeypatch, capsys):
    arguments = copy_of(begun, prepared, tmp_path / "run")
    assert train.main([*arguments, "--training.resume", str(tmp_path / "run/checkpoints/checkpoint-8")]) == 0
    assert "checkpoint-8" in capsys.readouterr().out
    assert results(tmp_path / "run") == whole
    for wrong in ("nowhere", str(tmp_path), str(begun / "checkpoints" / "checkpoint-8")):
        assert train.main([*arguments, "--training.resume", wrong]) == 1
        assert f"{wrong} is not a checkpoint of this run" in capsys.readouterr().err
    assert train.main([*arguments, "--training.resume", "never"]) == 0
    assert "resuming" not in capsys.readouterr().out
    assert results(tmp_path / "run") == whole
    die_after(monkeypatch, 3, signal.SIGINT)
    assert train.main([*arguments, "--training.resume", "never"]) == 130
    way_back = "stopped at step 3; the same command without training.resume: never resumes from there"
    assert way_back in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["base", "adapter", "loss", "disk"])
def test_a_start_that_fails_deletes_no_checkpoint(prepared, begun, tmp_path, monkeypatch, capsys, fails):
    arguments = [*copy_of(begun, prepared, tmp_path / "run"), "--training.resume", "never"]
    if fails == "base":
        base = write_base(tmp_path / "base")
        (base / "model.safetensors").unlink()
        monkeypatch.setattr("kestrel.model.base.base_identity", lambda *_: {})
        arguments += ["--model.name", str(base)]
    elif fails == "adapter":
        arguments += ["--lora.target_modules", "no_such_layer"]
    elif fails == "loss":
        monkeypatch.setattr("kestrel.training.fit.prove_loss", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr("kestrel.training.fit.training_bytes", lambda *_: 2**70)
    assert train.main(arguments) == 1, capsys.readouterr()
    assert names_in(tmp_path / "run") == ["checkpoint-12", "checkpoint-8"]


def test_a_run_may_be_moved(prepared, begun, whole, tmp_path, monkeypatch):
    """Checkpoints name the best one by its path; that folder is gone."""
    arguments = copy_of(begun, prepared, tmp_path / "elsewhere" / "run")
    for path in (tmp_path / "elsewhere" / "run" / "checkpoints").glob("*/trainer_state.json"):
        assert str(begun) in path.read_text()
    hidden = begun.with_name("hidden")
    begun.rename(hidden)
    try:
        assert train.main(arguments) == 0
    finally:
        hidden.rename(begun)
    assert results(tmp_path / "elsewhere" / "run") == whole


def test_a_finished_run_that_was_moved_keeps_its_best_adapter(prepared, tmp_path, monkeypatch):
    """No step is left to save a checkpoint in, so nothing but the recorded step says where the best one is."""
    with monkeypatch.context() as patch:
        worsen(patch, after=1)
        assert train.main([*prepared.copy_to(tmp_path / "one"), *LONG]) == 0
    best = results(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert train.main([*prepared.arguments("--run_dir", str(tmp_path / "two")), *LONG]) == 0
    assert results(tmp_path / "two") == best


def test_same_seed_same_bits(trained, tmp_path):
    """The four scripts from nothing, twice: dataset, adapter, log, generations and scores agree to the bit."""
    run, made = tmp_path / "run", []
    arguments = [*trained.arguments("--run_dir", str(run)), "--generation.do_sample", "--evaluation.resamples", "100"]
    for _ in range(2):
        for step in ("preprocess", "train", "generate", "evaluate"):
            assert script(step).main(arguments) == 0
        files = [path for path in run.rglob("*") if path.suffix in (".arrow", ".safetensors", ".jsonl", ".md", ".txt")]
        files += [run / "evaluation" / "metrics.json", run / "dataset" / "statistics.json"]
        made.append({path.relative_to(run): path.read_bytes() for path in files})
        shutil.rmtree(run)
    assert len(made[0]) > 15 and made[0] == made[1]


@pytest.mark.parametrize("evaluations", ["2", "8"])
def test_evaluations_do_not_disturb_the_training(prepared, tmp_path, evaluations):
    """Nothing random is drawn in them; so a run may be resumed with more of them or fewer."""
    last = []
    for number in ("4", evaluations):
        run = tmp_path / number
        assert train.main([*prepared.copy_to(run), "--training.evaluations", number]) == 0
        last.append((run / "checkpoints" / "checkpoint-8" / WEIGHTS).read_bytes())
    assert last[0] == last[1]
