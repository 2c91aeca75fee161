"""A merged model is loaded by anybody and answers like the adapter; one that does not is never written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from children import small_disk
from experiment import Experiment

import publish
from kestrel.publishing import merge
from kestrel.runtime import disk_space
from kestrel.runtime.atomic import clear_leftovers_of, read_json


def merged(experiment: Experiment, folder: Path, *more: str) -> int:
    """The exit status of a merge into a folder."""
    return publish.main(experiment.arguments("--merge", str(folder), *more))


def test_merged_model_loads_anywhere_and_answers_like_the_adapter(
    trained: Experiment, tmp_path: Path, monkeypatch, capsys
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(merge, "_SHARD", "200KB")
    folder = tmp_path / "merged"
    assert merged(trained, folder) == 0
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert "proven on the saved model" in capsys.readouterr().out
    facts = read_json(folder / "manifest.json", "")
    assert facts["logits_apart"] < 1e-2 and facts["answers"] > 0 and facts["settings"]["dtype"] == "bfloat16"
    assert "quantization_config" not in read_json(folder / "config.json", "")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    # Its own defaults are those of the run: greedy, and it knows its end.
    context = tokenizer("Persona: i have a dog .", return_tensors="pt")["input_ids"]
    assert model.generate(context).shape[1] <= context.shape[1] + 8
    assert model.generation_config.eos_token_id == 11
    # It is no copy of the base.
    base = AutoModelForCausalLM.from_pretrained(trained.base)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    assert not torch.equal(model.state_dict()[name], base.state_dict()[name])
    # Falcon's class never reads it; llama.cpp's converter does, and failed on transformers' default.
    assert read_json(folder / "config.json", "")["num_kv_heads"] == 1
    assert "none was tried with this model" in " ".join((folder / "README.md").read_text().split())
    assert (folder / "Modelfile").read_text().count("FROM ./model.gguf\n") == 1
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.[jm][sd]*"))
    modes = {path.stat().st_mode for path in folder.iterdir() if path.name != "manifest.json"}
    assert len(modes) == 1, "what serves the model may run as somebody else"
    # The same folder again, after its user put a converted model there.
    (folder / "model.gguf").write_bytes(b"hours of work")
    assert merged(trained, folder) == 1
    assert (folder / "model.gguf").read_bytes() == b"hours of work"


def test_a_merge_into_another_base_is_caught_and_leaves_nothing(
    trained: Experiment, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The usual way: into the 16-bit weights of which the 4-bit ones were made."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def usual(adapted, folder, settings):
        base = AutoModelForCausalLM.from_pretrained(settings.model.name, dtype=torch.float32)
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()

    monkeypatch.setattr(merge, "_merged", usual)
    folder = tmp_path / "merged"
    assert merged(trained, folder) == 1
    assert "does not compute what the adapter on its base does" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_told_from_a_wrong_merge() -> None:
    """TRAPS' figures for bfloat16: 0.008 where it is right, 0.08 and more where it is not."""
    torch.manual_seed(0)
    logits, noise = torch.randn(32, 100), torch.randn(32, 100)

    def apart(share: float) -> float:
        return merge.relative_difference(logits, logits + share * noise * logits.norm() / noise.norm(), "bfloat16")

    assert apart(0.008) == pytest.approx(0.008, rel=1e-3)
    for wrong in (0.08, float("nan")):
        with pytest.raises(merge.ProofError, match="nothing was written"):
            apart(wrong)


def test_a_merge_is_made_again_over_an_older_one_and_without_a_dataset(trained: Experiment, tmp_path: Path) -> None:
    adapter, folder = trained.run / "adapter", tmp_path / "merged"
    more = ["--run_dir", str(tmp_path / "empty"), "--model.adapter", str(adapter)]
    for dtype in ("float16", "float32"):
        assert merged(trained, folder, *more, "--merge-dtype", dtype) == 0
        assert read_json(folder / "config.json", "")["dtype"] == dtype
    facts = read_json(folder / "manifest.json", "")
    assert facts["logits_apart"] < 1e-4 and facts["same_answers"] == facts["answers"] == 4
    assert publish.main(trained.arguments("--merge-dtype", "float16")) == 2


def test_what_stands_in_the_way_is_named_and_not_overwritten(trained: Experiment, tmp_path: Path, capsys) -> None:
    before = sorted((trained.run / "adapter").iterdir())
    assert merged(trained, trained.run / "adapter") == 1
    assert "holds something else" in capsys.readouterr().err and sorted((trained.run / "adapter").iterdir()) == before
    (tmp_path / "file").write_text("x")
    assert merged(trained, tmp_path / "file" / "merged") == 1
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert merged(trained, tmp_path / "m", "--run_dir", str(tmp_path / "empty")) == 1
    assert "train it with" in capsys.readouterr().err


def test_a_full_disk_is_reported_and_leaves_nothing(trained: Experiment, tmp_path: Path, capsys, monkeypatch) -> None:
    with small_disk(tmp_path / "disk", 150) as small:
        assert merged(trained, small / "merged") == 1
        printed = capsys.readouterr()
        assert "the disk is too full" in printed.err and "name another folder" in printed.err
        assert "base:" not in printed.out, "it is reported before a weight is loaded"
        monkeypatch.setattr(disk_space, "require_room", lambda *_: None)
        assert merged(trained, small / "merged") == 1
        printed = capsys.readouterr()
        assert "the disk is full" in printed.err and "merged model's files need about" in printed.err
        assert list(small.iterdir()) == []


def test_memory_that_is_too_small_gets_advice_for_a_merge(trained: Experiment, tmp_path: Path, capsys, monkeypatch):
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merge, "_merged", exhausted)
    assert merged(trained, tmp_path / "merged") == 1
    said = capsys.readouterr().err
    assert "CUDA_VISIBLE_DEVICES=" in said and "tokens_per_step" not in said and list(tmp_path.iterdir()) == []


def test_what_a_killed_merge_left_is_cleared_and_a_running_one_is_not(trained: Experiment, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive = (tmp_path / f".merged.incomplete-{pid}" for pid in (gone.pid, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    assert merged(trained, tmp_path / "merged") == 0
    assert not dead.exists() and alive.exists()
    # Killed between two renames, the older model stands aside only.
    (tmp_path / "merged").rename(tmp_path / f".merged.former-{gone.pid}")
    clear_leftovers_of(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
