"""The four scripts on models other than Falcon-7B: quantized, audited, trained, answering and scored likewise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_models import make_tokenizer, words, write_base, write_config, write_corpus
from make_tokenizers import CHATML, INST, byte_level, sentencepiece_like
from safetensors.torch import load_file
from scripts import ROOT, rows_in, script

import generate
import preprocess
import train
from kestrel.config.resolve import resolve
from kestrel.runtime.atomic import read_json

TEXTS = [turn["text"] for turn in words(["i have a dog .", "my favorite food is soup .", "i live in rome ."])] * 3

# Each architecture with a tokenizer of the kind that its models come with, and its linear layers but the output head.
_GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
SHAPES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "llama": (lambda: sentencepiece_like(TEXTS), _GATED),
    "mistral": (lambda: sentencepiece_like(TEXTS), _GATED),
    "qwen2": (lambda: byte_level(TEXTS), _GATED),
    "gpt_neox": (lambda: byte_level(TEXTS, None), _FUSED),
    "falcon-new": (make_tokenizer, _FUSED),  # Falcon-40B's: several key/value heads in the fused layer
    "falcon-alibi": (make_tokenizer, _FUSED),  # Falcon-RW's: biases, and no rotation
}
LAYERS = 2

evaluate = script("evaluate").main


def run_all(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What the four scripts print; none may fail or warn."""
    for main in (preprocess.main, train.main, generate.main):
        assert main(arguments) == 0, capfd.readouterr().err
    assert evaluate([*arguments, "--evaluation.resamples", "100"]) == 0, capfd.readouterr().err
    said = capfd.readouterr()
    assert said.err == ""
    return said.out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 12)


def assert_taught(run: Path, layers: set[str]) -> None:
    """Every layer is in 4 bit and has an adapter that moved, and the references became likelier by it."""
    count = LAYERS * len(layers)
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    expected = {"bits": 4, "quant_type": "nf4", "double_quant": True, "layers_4bit": count, "layers_expected": count}
    assert expected.items() <= manifest["audit"].items()

    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    moved = [name for name, weight in weights.items() if ".lora_B." in name and torch.count_nonzero(weight)]
    assert len(moved) == count and {name.split(".lora_B")[0].rpartition(".")[2] for name in moved} == layers

    losses = [line["eval_loss"] for line in rows_in(run / "logs" / "training.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    systems = json.loads((run / "evaluation" / "metrics.json").read_text())["systems"]
    assert systems["adapter"]["perplexity"]["token"] < 0.8 * systems["base"]["perplexity"]["token"]


@pytest.mark.parametrize("architecture", SHAPES)
def test_every_architecture_goes_through_all_scripts(architecture, source, tmp_path, capfd):
    tokenizer, layers = SHAPES[architecture]
    base = write_base(tmp_path / "base", architecture, tokenizer())
    config = write_config(tmp_path / "config.yaml", base, source, tmp_path / "run", "evaluation:\n  resamples: 100\n")
    more = ["--lora.target_modules", "all-linear", "--training.max_steps", "16", "--prompt.max_length", "400"]
    said = run_all(["--config", str(config), *more], capfd)
    count = LAYERS * len(layers)
    assert said.count(f"{count} of {count} linear layers in nf4, double quantization") == 2
    assert_taught(tmp_path / "run", layers)


def test_gpt2_with_absolute_positions_and_the_layers_of_transformers(source, tmp_path, capsys):
    base = write_base(tmp_path / "base", "gpt2")
    config = write_config(tmp_path / "c.yaml", base, source, tmp_path / "run")
    arguments = ["--config", str(config), "--lora.target_modules", "all-linear", "--training.max_steps", "2"]
    arguments += ["--training.recompute", "dense"]
    assert preprocess.main(arguments) == 0 and train.main(arguments) == 0 and generate.main(arguments) == 0
    assert "note: training.recompute: dense is none for the layers of transformers\n" in capsys.readouterr().out


@pytest.mark.parametrize("template", [CHATML, INST], ids=["with a system message", "system within the first message"])
def test_an_instruct_model_with_its_chat_template(template, source, tmp_path, capfd):
    """The shipped configuration, on a tiny model: only what names the big one and its machine is replaced."""
    tokenizer = byte_level(TEXTS, template) if template == CHATML else sentencepiece_like(TEXTS, chat_template=template)
    base = write_base(tmp_path / "base", "qwen2", tokenizer)
    run = tmp_path / "run"
    replaced = {
        "run_dir": run, "data.source": source, "model.name": base, "quantization.compute_dtype": "float32",
        "training.learning_rate": 1e-2, "training.max_steps": 16, "training.batch_size": 4,
        "generation.max_new_tokens": 8,
    }  # fmt: skip
    arguments = ["--config", str(ROOT / "configs" / "qwen2.5-7b-instruct.yaml")]
    for key, value in replaced.items():
        arguments += [f"--{key}", str(value)]
    run_all(arguments, capfd)
    assert_taught(run, _GATED)
    prompt = json.loads((run / "adapter" / "prompt.json").read_text())
    assert prompt["format"] == "chat" and prompt["chat_template"] == template
    assert prompt["end_token"] == tokenizer.eos_token


def test_layers_are_chosen_for_the_model_or_named_as_its_own(source, tmp_path, capsys):
    base = write_base(tmp_path / "base", "llama", sentencepiece_like(TEXTS))
    config = write_config(tmp_path / "config.yaml", base, source, tmp_path / "run")
    arguments = ["--config", str(config), "--prompt.max_length", "400"]
    assert preprocess.main(arguments) == 0
    assert train.main([*arguments, "--lora.target_modules", "query_key_value"]) == 1
    said = capsys.readouterr().err
    assert "lora.target_modules ['query_key_value'] does not fit this model" in said
    assert f"its linear layers are {', '.join(sorted(_GATED))}; all-linear takes all of them" in said
    assert train.main(arguments) == 0 and "trainable parameters on all-linear" in capsys.readouterr().out
    assert read_json(tmp_path / "run/adapter/manifest.json", "")["settings"]["lora"]["target_modules"] == "all-linear"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_name_layers_that_their_model_has(path):
    settings, _ = resolve(str(path), {})
    targets = settings.lora.target_modules
    is_falcon = "falcon" in settings.model.name or settings.model.name == "quickstart/base"
    assert targets in ("auto", "all-linear") or is_falcon and set(targets) <= _FUSED
