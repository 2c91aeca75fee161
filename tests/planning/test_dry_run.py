"""--dry-run of train.py and generate.py: what it prints, and that it loads, locks and changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from make_models import make_config, settings_of

import generate
import train
from kestrel.config.settings import Lora, Quantization, Training
from kestrel.errors import KestrelError
from kestrel.planning import dry_run
from kestrel.planning.passes import Dialogues, Plan
from kestrel.runtime.run_folder import locked_run_folder


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"  # whose holder touches it
    }


@pytest.fixture
def without_weights(prepared, tmp_path) -> list[str]:
    """Arguments for the prepared experiment, whose base has lost its weights."""
    base = tmp_path / "base"
    shutil.copytree(prepared.base, base)
    (base / "model.safetensors").unlink()
    return [*prepared.copy_to(tmp_path / "run"), "--model.name", str(base), "--dry-run"]


def test_prints_what_training_takes_and_touches_nothing(without_weights, tmp_path, capsys):
    with locked_run_folder(str(tmp_path / "run"), ""):  # as while training
        before = files_of(tmp_path)
        assert train.main([*without_weights, "--training.device_memory", "24GiB"]) == 0
        assert files_of(tmp_path) == before
    printed = capsys.readouterr().out
    rows = {name: float(value) for name, value in re.findall(r"^(.+?) {2,}([\d.]+)$", printed, flags=re.MULTILINE)}
    for text in ("in nf4", "it fits", "8 steps", "% of the computed positions are padding"):
        assert text in printed
    assert sum(list(rows.values())[:7]) == pytest.approx(rows["peak of all tensors"], abs=0.05)
    assert rows["with the allocator's slack and CUDA"] > rows["peak of all tensors"]
    assert "training.tokens_per_step: " in printed and "recompute: dense, chosen for auto" in printed
    assert "time: not measured, this machine has no GPU" in printed


def test_prints_what_answering_takes_and_touches_nothing(without_weights, tmp_path, capsys):
    """Before there is an adapter."""
    given = [*without_weights, "--training.device_memory"]
    with locked_run_folder(str(tmp_path / "run"), ""):
        before = files_of(tmp_path)
        assert generate.main([*given, "24GiB"]) == 0
        assert files_of(tmp_path) == before
    printed = capsys.readouterr().out
    rows = {name: float(value) for name, value in re.findall(r"^(.+?) {2,}([\d.]+)$", printed, flags=re.MULTILINE)}
    assert sum(list(rows.values())[:6]) == pytest.approx(rows["peak of all tensors"], abs=0.05)
    assert "in nf4" in printed and "once more, in float32" in printed and "it fits" in printed
    assert "generation.tokens_per_step: 65,536, chosen for auto" in printed
    assert "7 replies, of which at most 7 grow side by side; passes: 1, batches of answers: 1" in printed
    assert generate.main([*given, "600MiB"]) == 1 and "answering does not fit" in capsys.readouterr().err
    assert generate.main([*given, "24GiB", "--generation.num_beams", "2"]) == 0
    assert "not estimated: transformers' generate makes" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_compared(without_weights, capsys):
    """And an optimizer that needs one can be planned for."""
    changes = ["--training.tokens_per_step", "77", "--training.optimizer", "paged_adamw_8bit"]
    assert train.main([*without_weights, *changes]) == 0
    printed = capsys.readouterr().out
    assert (
        "no GPU found; to plan for one, name its memory" in printed
        and "memory of this machine" in printed
        and "training.tokens_per_step: 77\n" in printed
    )
    assert "state of paged_adamw_8bit" in printed


def test_what_does_not_fit_is_an_error_with_the_most_effective_changes(without_weights, capsys):
    changes = [*without_weights, "--training.device_memory", "650MiB", "--quantization.bits", "16", "--lora.r", "2000"]
    assert train.main(changes) == 1
    printed = capsys.readouterr()
    assert "it does not fit" in printed.out and "not measured" in printed.out
    left = [float(value) for value in re.findall(r"less: ([\d.]+) MiB\)", printed.err)]
    assert "training does not fit; most effective changes first:\n" in printed.err
    assert left == sorted(left) and len(left) > 1 and max(left) < 1024
    assert "lora.r: 1000" in printed.err


def test_it_needs_the_dataset(prepared, tmp_path, capsys):
    assert train.main(prepared.arguments("--dry-run", "--run_dir", str(tmp_path / "new"))) == 1
    assert "preprocess.py" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["24", "much", "0GiB", "24 TB", "-1GiB"])
def test_device_memory_must_be_an_amount(prepared, capsys, text):
    assert train.main(prepared.arguments("--dry-run", f"--training.device_memory={text}")) == 2
    assert "expected an amount of memory such as 24GiB" in capsys.readouterr().err


def test_dense_weights_of_a_sharded_base_are_refused_as_in_training():
    settings, lengths = settings_of(training=Training(recompute="dense")), np.full(4, 20)
    with pytest.raises(KestrelError, match="dense keeps all weights in each process"):
        dry_run.report(settings, make_config("falcon"), Dialogues(lengths, lengths, [np.arange(4)]), sharded=True)


def test_the_time_of_a_run_is_that_of_its_passes(monkeypatch):
    """Measured on passes that are spread over the run, after a warm-up with the largest one."""
    timed = []
    own = dry_run._seconds_of
    monkeypatch.setattr(
        dry_run, "_seconds_of", lambda model, shapes, place: timed.append(shapes) or own(model, shapes, place)
    )
    settings = settings_of(lora=Lora(r=4), quantization=Quantization(compute_dtype="float32"))
    lengths = np.repeat([20, 40, 60, 80], 10)
    dialogues = Dialogues(lengths, lengths // 2, np.array_split(np.arange(40), 10))
    printed = dry_run._measured(settings, make_config("falcon"), Plan(160, "mlp"), dialogues)
    match = re.match(r"about (\d+) s of training, from 12 passes with random weights \(([\d,]+) tokens/s", printed)
    assert match is not None
    assert int(match[1]) == pytest.approx(2000 / int(match[2].replace(",", "")), abs=0.6)
    passes = dialogues.passes(160)
    assert timed[0][0] == dialogues.largest(160) and len(timed[1]) == 12
    assert (timed[1][0], timed[1][-1]) == (passes[0], passes[-1])
    assert [dry_run._duration(seconds) for seconds in (42.4, 600, 9000)] == ["42 s", "10 min", "2.5 h"]
