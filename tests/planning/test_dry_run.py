"""train.py --dry-run: what it says, and that it loads, locks and changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_models import make_config

import train
from kestrel.config.settings import Data, Lora, Model, Quantization, Settings
from kestrel.model.loss import attach_token_nll
from kestrel.planning import dry_run
from kestrel.planning.memory import Pass
from kestrel.planning.passes import Dialogues, Plan
from kestrel.planning.random_base import random_model
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


def numbers_of(said: str) -> dict[str, float]:
    rows = re.findall(r"^(.+?) {2,}([\d.]+)$", said, flags=re.MULTILINE)
    return {name: float(value) for name, value in rows}


def test_it_says_what_training_takes_and_touches_nothing(without_weights, tmp_path, capsys):
    with locked_run_folder(str(tmp_path / "run"), ""):  # somebody trains there
        before = files_of(tmp_path)
        assert train.main([*without_weights, "--training.device_memory", "24GiB"]) == 0
        assert files_of(tmp_path) == before
    said = capsys.readouterr().out
    rows = numbers_of(said)
    values = list(rows.values())
    assert (
        "in nf4" in said
        and "it fits" in said
        and "8 steps" in said
        and "% of the computed positions are padding" in said
    )
    assert sum(values[:7]) == pytest.approx(rows["peak of all tensors"], abs=0.05)
    assert rows["with the allocator's slack and CUDA's context"] > rows["peak of all tensors"]
    assert "training.tokens_per_step: " in said and "recompute: none, chosen for auto" in said
    assert "time: not measured, this machine has no GPU" in said


def test_without_a_card_nothing_is_compared(without_weights, capsys):
    assert train.main([*without_weights, "--training.tokens_per_step", "77"]) == 0
    said = capsys.readouterr().out
    assert "no GPU found; name a size" in said and "training.tokens_per_step: 77\n" in said


def test_what_does_not_fit_is_an_error_that_says_what_helps_most(without_weights, capsys):
    changes = [*without_weights, "--training.device_memory", "650MiB", "--quantization.bits", "16", "--lora.r", "2000"]
    assert train.main(changes) == 1
    said = capsys.readouterr()
    assert "it does not fit" in said.out and "not measured" in said.out
    left = [float(value) for value in re.findall(r"less: ([\d.]+) MiB\)", said.err)]
    assert "training does not fit; most effective changes first:\n" in said.err
    assert left == sorted(left) and len(left) > 1 and max(left) < 1024
    assert "lora.r: 1000" in said.err


def test_a_gpu_optimizer_can_be_planned_for_without_a_gpu(without_weights, capsys):
    assert train.main([*without_weights, "--training.optimizer", "paged_adamw_8bit"]) == 0
    assert "state of paged_adamw_8bit" in capsys.readouterr().out


def test_it_needs_the_dataset(prepared, tmp_path, capsys):
    assert train.main(prepared.arguments("--dry-run", "--run_dir", str(tmp_path / "new"))) == 1
    assert "preprocess.py" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["24", "much", "0GiB", "24 TB", "-1GiB"])
def test_memory_that_is_no_amount_is_refused(prepared, capsys, text):
    assert train.main(prepared.arguments("--dry-run", f"--training.device_memory={text}")) == 2
    assert "expected an amount of memory such as 24GiB" in capsys.readouterr().err


def test_passes_are_timed():
    chosen = Settings(
        run_dir="unused",
        data=Data(source="unused"),
        model=Model(name="unused"),
        quantization=Quantization(compute_dtype="float32"),
        lora=Lora(r=4),
    )
    model = random_model(chosen, make_config("falcon"), torch.device("cpu")).train()
    attach_token_nll(model)
    passes = [Pass(1 + index % 3, 20 + index, 10) for index in range(40)]
    shapes = dry_run._sample(passes, Pass(4, 60, 100))
    seconds, tokens = dry_run.time_passes(model, shapes, torch.device("cpu"))
    assert tokens == sum(shape.tokens for shape in shapes[3:]) and len(shapes) == 15
    assert {shapes[3], shapes[-1]} == {passes[0], passes[-1]}
    assert 0 < seconds < 60
    assert len(dry_run._sample(passes[:1], passes[0])) == 15


def test_the_time_of_a_run_is_that_of_its_passes():
    chosen = Settings(
        run_dir="unused", data=Data(source="unused"), model=Model(name="unused"), lora=Lora(r=4),
        quantization=Quantization(compute_dtype="float32"),
    )  # fmt: skip
    lengths = np.full(40, 60)
    dialogues = Dialogues(lengths, lengths // 2, np.array_split(np.arange(40), 10))
    said = dry_run._measured(chosen, make_config("falcon"), Plan(120, "mlp"), dialogues)
    found = re.match(r"about (\d+) s of training, from 12 passes with random weights \(([\d,]+) tokens/s", said)
    assert found is not None
    assert int(found[1]) == pytest.approx(2400 / int(found[2].replace(",", "")), abs=0.6)


@pytest.mark.parametrize(("seconds", "said"), [(42.4, "42 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds, said):
    assert dry_run._duration(seconds) == said
