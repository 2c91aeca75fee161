"""What is refused or settled about a base before its weights load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from make_models import make_tokenizer, settings_of, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from kestrel.config.settings import Lora, Quantization
from kestrel.errors import KestrelError
from kestrel.model import gpu_memory
from kestrel.model.base import load_base, open_base
from kestrel.prompt.load import load_prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["horse", "pizza"]), "386 tokens, such as 'horse'.* 384 rows"),
        (lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|fin|>"}), "385 tokens.* 384 rows"),
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}), None),  # no prompt holds it
    ],
)
def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path, change: Any, message: str | None) -> None:
    base, tokenizer = write_base(tmp_path / "base"), make_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(base)
    settings = settings_of(base)
    prompt = load_prompt(settings)
    if message is None:
        open_base(settings, prompt)
    else:
        with pytest.raises(KestrelError, match=message):
            open_base(settings, prompt)


def test_an_adapter_beside_the_base_is_refused(tmp_path: Path) -> None:
    settings = settings_of(write_base(tmp_path / "base"))
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(KestrelError, match="holds an adapter .* delete adapter_config.json"):
        open_base(settings, load_prompt(settings))


def test_layers_are_chosen_by_architecture(tmp_path: Path) -> None:
    for architecture, layers in (("falcon", ["query_key_value"]), ("llama", "all-linear")):
        settings = settings_of(write_base(tmp_path / architecture, architecture))
        assert open_base(settings, load_prompt(settings))[0].lora.target_modules == layers
        chosen = settings_of(tmp_path / architecture, lora=Lora(target_modules=["dense"]))
        assert open_base(chosen, load_prompt(chosen))[0].lora.target_modules == ["dense"]


def test_a_base_in_4_bit_keeps_its_own_form(tmp_path: Path, capsys) -> None:
    plain, held = write_base(tmp_path / "plain", "llama"), tmp_path / "held"
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=form, device_map={"": "cpu"}).save_pretrained(held)
    AutoTokenizer.from_pretrained(plain).save_pretrained(held)
    settings = settings_of(held, quantization=Quantization(compute_dtype="float32"))
    resolved, _ = open_base(settings, load_prompt(settings))
    assert "saved in 4 bit (nf4, without double quantization)" in capsys.readouterr().out
    assert not resolved.quantization.double_quant
    _, audit = load_base(resolved)
    assert audit.layers_4bit == audit.layers_expected and audit.compute_dtype == "float32"
    asked = settings_of(held, quantization=Quantization(double_quant=True, compute_dtype="float32"))
    with pytest.raises(KestrelError, match="quantization.double_quant True"):
        open_base(asked, load_prompt(asked))
    config = json.loads((held / "config.json").read_text())
    (held / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(KestrelError, match="already quantized .gptq."):
        open_base(settings, load_prompt(settings))


def test_a_users_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_of("~/base").model.name == os.path.join(tmp_path, "base")


def test_a_models_own_ends_end_an_answer_and_ordinary_ids_do_not(tmp_path: Path) -> None:
    prompt = load_prompt(settings_of(write_base(tmp_path / "base")))
    prompt.ends_also_at([3, 11, 40])
    assert prompt.end_id == 11 and prompt.end_ids == {3, 11}, "3 is a special token, 40 is text"
    prompt.ends_also_at(None)
    prompt.ends_also_at(4)
    assert prompt.end_ids == {3, 4, 11}


@pytest.mark.parametrize(("can_map", "environment"), [(True, {}), (False, {}), (True, {"PYTORCH_ALLOC_CONF": "x:1"})])
def test_memory_segments_grow_where_the_card_can_map_memory(can_map, environment, monkeypatch):
    chosen: list[str] = []

    def empty(*_: Any, **__: Any) -> None:
        if not can_map:
            raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", chosen.append)
    monkeypatch.setattr(torch, "empty", empty)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert gpu_memory.let_segments_grow(torch.device("cuda")) == (can_map and not environment)
    assert chosen[-1:] == ([] if environment else [f"expandable_segments:{can_map}"])
    assert not gpu_memory.let_segments_grow(torch.device("cpu"))
