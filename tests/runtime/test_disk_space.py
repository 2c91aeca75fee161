"""A disk that is too small or fills up: the message says what is needed, and the last good state is kept for later."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from children import small_disk
from experiment import Experiment
from scripts import script, snapshot

from kestrel.data.dataset import load_split
from kestrel.errors import KestrelError
from kestrel.runtime import disk_space


def fill(folder: Path, leave: int) -> None:
    """Fills a disk except for so many bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        while (free := shutil.disk_usage(folder).free) > leave:
            file.write(bytes(min(free - leave, 2**20)))


@pytest.fixture(scope="module")
def answered(trained: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The experiment after generate.py. Read it, or copy it."""
    run = tmp_path_factory.mktemp("answered") / "run"
    assert script("generate").main(trained.copy_to(run)) == 0
    return Experiment(trained.config, run, trained.base, trained.source)


@pytest.fixture
def before(name, prepared, trained, answered) -> Experiment:
    """The experiment as the script of that name finds it."""
    return {"preprocess": prepared, "train": prepared, "generate": trained, "evaluate": answered}[name]


@pytest.mark.parametrize("name", ["preprocess", "train", "generate", "evaluate"])
def test_too_small_a_disk_is_refused_at_once(name, before, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 8192) as small:
        options = before.copy_to(small / "run")
        files = snapshot(small / "run")
        fill(small, 12_000)
        assert script(name).main(options) == 1
        said = capsys.readouterr().err
        assert f"{name}.py: the disk is too full" in said and "need about" in said and "KiB are free" in said, said
        assert snapshot(small / "run") == files


LEFT = {"preprocess": (8_192, 40_960), "train": (40_960, 102_400, 204_800), "generate": (8_192, 12_288),
        "evaluate": (16_384, 131_072)}  # fmt: skip


@pytest.mark.parametrize(("name", "leave"), [(name, leave) for name, leaves in LEFT.items() for leave in leaves])
def test_a_disk_that_fills_up_meanwhile(name, leave, before, tmp_path, capsys, monkeypatch):
    """As when another program writes too, after the estimate."""
    with small_disk(tmp_path / "disk", 8192) as small:
        options = before.copy_to(small / "run")
        files = snapshot(small / "run")
        fill(small, leave)
        with monkeypatch.context() as patch:
            patch.setattr(disk_space, "require_room", lambda *_: None)
            assert script(name).main(options) == 1
        said = capsys.readouterr().err
        assert f"{name}.py: the disk is full; what was finished is kept." in said and "need about" in said, said
        after = snapshot(small / "run")
        assert files.items() <= after.items()
        new = after.keys() - files.keys()
        visible = ("adapter/", "evaluation/")
        assert not [path for path in new if "incomplete" in path or path.startswith(visible)]
        checkpoints = {path.rpartition("/")[0] for path in new if path.startswith("checkpoints/")}
        assert all(f"{checkpoint}/manifest.json" in new for checkpoint in checkpoints), "each is complete"
        (small / "filler").unlink()
        assert script(name).main(options) == 0
        answers = {path: after[path] for path in new if path.startswith("generations/test")}
        assert answers.items() <= snapshot(small / "run").items(), "what had its name was whole"


def test_no_space_is_reported_without_a_disk_to_fill(prepared, tmp_path, capsys, monkeypatch):
    """What safetensors raises is no OSError."""
    from transformers import Trainer

    def full(self, model, trial):
        (Path(self.args.output_dir) / "checkpoint-2").mkdir(parents=True)
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    assert script("train").main(prepared.copy_to(tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said and "checkpoints, logs and adapter need about" in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_estimates_are_enough_and_not_extravagant(answered, trained, tmp_path):
    """Against what the scripts really wrote; where files are tiny, what is fixed weighs most."""
    sources = sorted(answered.source.glob("*.jsonl"))
    written = size_of(answered.run / "dataset")
    assert written <= disk_space.dataset_bytes(sources, None) + 2**16
    assert disk_space.dataset_bytes(sources, 1) < disk_space.dataset_bytes([*sources] * 1000, None)

    weights = 1280  # rank 4 on the query_key_value of two layers: 2 * 4 * (64 + 96)
    checkpoints = answered.run / "checkpoints"
    one = max(size_of(folder) for folder in checkpoints.iterdir())
    estimate = disk_space.training_bytes(weights, 384, 8, 2, tmp_path)
    assert 3 * one + size_of(answered.run / "adapter") <= estimate <= 6 * one
    assert disk_space.training_bytes(weights, 384, 8, 2, checkpoints) < estimate, "what is there will be replaced"

    files = sorted((answered.run / "generations").glob("test.*.jsonl"))
    rows = load_split(answered.run / "dataset", "test", "")
    estimate = disk_space.answers_bytes(rows, 8, len(files))
    assert 1.5 * sum(file.stat().st_size for file in files) <= estimate <= 6 * sum(f.stat().st_size for f in files)
    assert script("evaluate").main(answered.copy_to(tmp_path / "run")) == 0
    assert size_of(tmp_path / "run" / "evaluation") <= disk_space.evaluation_bytes(files)


@pytest.mark.parametrize(("size", "told"), [(100, "0 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.0 GiB")])
def test_sizes_have_the_unit_that_fits(tmp_path, monkeypatch, size, told):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, size - 1))  # type: ignore[attr-defined]
    with pytest.raises(KestrelError, match=f"the files need about {told}"):
        disk_space.require_room("the files", size, tmp_path / "not" / "yet")
