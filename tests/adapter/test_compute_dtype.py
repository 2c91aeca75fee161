"""`quantization.compute_dtype: auto`: the machine's type, and that of what was trained, whatever the machine."""

from __future__ import annotations

import pytest
import torch
from make_models import settings_of
from transformers import AutoConfig

import generate
import train
from kestrel.adapter.compute_dtype import with_compute_dtype
from kestrel.config.settings import Quantization
from kestrel.model.kernels import cards
from kestrel.runtime.atomic import read_json


def on(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(cards, "best_dtype", lambda: dtype)


def test_what_was_trained_keeps_its_type_on_another_machine(prepared, tmp_path, monkeypatch, capsys):
    arguments = [*prepared.copy_to(tmp_path / "run"), "--quantization.compute_dtype", "auto", "--training.samples", "0"]
    arguments += ["--training.max_steps", "4", "--training.evaluations", "2"]
    on(monkeypatch, "float32")
    assert train.main(arguments) == 0
    assert "compute type: float32, on this CPU" in capsys.readouterr().out
    checkpoint, adapter = (tmp_path / "run" / name for name in ("checkpoints/checkpoint-4", "adapter"))
    assert read_json(adapter / "manifest.json", "")["settings"]["quantization"]["compute_dtype"] == "float32"
    on(monkeypatch, "bfloat16")
    assert train.main(arguments) == 0
    assert f"compute type: float32, recorded in {checkpoint}" in capsys.readouterr().out
    assert generate.main(arguments) == 0
    assert f"compute type: float32, recorded in {adapter}" in capsys.readouterr().out
    assert train.main([*arguments, "--training.resume", "never"]) == 0
    assert "compute type: bfloat16, on this CPU" in capsys.readouterr().out
    assert read_json(adapter / "manifest.json", "")["settings"]["quantization"]["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize(("architecture", "expected"), [("llama", "float16"), ("gemma3_text", "float32")])
def test_on_an_old_card(tmp_path, monkeypatch, architecture, expected):
    AutoConfig.for_model(architecture, vocab_size=384).save_pretrained(str(tmp_path))
    monkeypatch.setattr(cards, "capability", lambda: (7, 5))
    settings = settings_of(tmp_path, quantization=Quantization())
    assert settings.quantization.compute_dtype == "auto"
    assert with_compute_dtype(settings).quantization.compute_dtype == expected


def test_a_plan_for_a_card_that_is_not_there():
    assert (
        with_compute_dtype(settings_of(quantization=Quantization()), planned=True).quantization.compute_dtype
        == "bfloat16"
    )


def test_the_types_that_cpus_compute_in(monkeypatch):
    for supported, expected in ((True, "bfloat16"), (False, "float32")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported)
        assert cards.best_dtype() == expected
