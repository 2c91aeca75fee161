"""4-bit asked is 4-bit held: the audit passes where it is true and fails where it is not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from make_models import settings_of, write_base
from transformers import AutoConfig, AutoModelForCausalLM

import kestrel.model.base
from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Lora, Quantization, Settings
from kestrel.errors import KestrelError, ProofError
from kestrel.model.base import load_base, skeleton_of
from kestrel.model.loss import attach_token_nll, collate, token_nll
from kestrel.model.quantization import audit, expected_footprint_bytes, forbid_repacking, linear_layers
from kestrel.planning.random_base import random_model

ARCHITECTURES = ["falcon", "llama", "gpt_neox", "qwen2", "gpt2"]


def settings_for(base: Path, **quantization: object) -> Settings:
    return settings_of(base, quantization={"compute_dtype": "float32", **quantization})


def load(base: Path, **quantization: object) -> Any:
    return load_base(settings_for(base, **quantization))[0]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    # Wide enough that the layers, not the embedding, are most of it, as in a real model.
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_base(folder / name, name, hidden=128) for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_audit_passes_for_what_is_really_in_4_bit_and_all_linear_adapts_it(bases, architecture):
    model, report = load_base(settings_for(bases[architecture]))
    assert report.layers_4bit == report.layers_expected == len(linear_layers(skeleton_of(model.config)))
    assert (report.quant_type, report.double_quant) == ("nf4", True)
    assert "in nf4, double quantization" in report.line()
    adapted = add_lora(model, Lora(r=2, target_modules="all-linear"), seed=0)
    assert sum(name.endswith("lora_A") for name, _ in adapted.named_modules()) == report.layers_4bit


def test_audit_fails_without_the_remedy(bases, monkeypatch):
    """Passes as long as transformers skips Falcon's layers; once it fails, `quantizable_layers` can go."""
    monkeypatch.setattr(kestrel.model.base, "quantizable_layers", nullcontext)
    with pytest.raises(ProofError, match=r"8 of 8 linear layers are not in 4 bit, such as transformer\.h\.0\..*Falcon"):
        load_base(settings_for(bases["falcon"]))


def test_remedy_leaves_the_library_as_it_was(bases):
    from transformers.models.falcon import modeling_falcon

    before = modeling_falcon.FalconLinear
    load_base(settings_for(bases["falcon"]))
    assert modeling_falcon.FalconLinear is before is not torch.nn.Linear


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        ({"type": "fp4"}, {}, "quantization type is fp4; the settings ask for nf4"),
        ({"double_quant": False}, {}, "double quantization is False; the settings ask for True"),
        ({}, {"double_quant": False}, "double quantization is True; the settings ask for False"),
        ({"compute_dtype": "bfloat16"}, {}, "compute type is bfloat16; the settings ask for float32"),
        ({}, {"bits": 16}, "8 layers are in 4 bit; the settings ask for 16 bits"),
        ({"bits": 16}, {}, "8 of 8 linear layers are not in 4 bit"),
        ({"bits": 16}, {"bits": 16, "compute_dtype": "bfloat16"}, "is held in float32; the settings ask for bfloat16"),
    ],
)
def test_audit_fails_for_anything_but_what_is_asked(bases, held, asked, message):
    model = load(bases["falcon"], **held)
    wanted = settings_for(bases["falcon"], **asked).quantization
    with pytest.raises(ProofError, match=message):
        audit(model, skeleton_of(model.config), wanted)


def test_audit_sees_one_skipped_layer_and_a_fat_embedding(bases):
    model = load(bases["llama"], compute_dtype="bfloat16")
    wanted = settings_for(bases["llama"], compute_dtype="bfloat16").quantization
    skeleton = skeleton_of(model.config)
    model.model.embed_tokens.float()
    with pytest.raises(ProofError, match=r"model\.embed_tokens is held in float32"):
        audit(model, skeleton, wanted)
    model.model.embed_tokens.bfloat16()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ProofError, match=r"1 of 14 linear layers are not in 4 bit, such as model\.layers\.1\.mlp\.up"):
        audit(model, skeleton, wanted)


def test_rows_that_bitsandbytes_makes_wrong_on_a_cpu_are_refused(tmp_path):
    """96 inputs in blocks of 64. On a CPU with AVX-512 its dense weights are a quarter of their norm away from what was
    quantized, where rounding to 4 bit is a tenth; on others they are right, and the base is loaded.
    """
    shape = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **shape, intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    weights = torch.randn(64, 96)
    apart = (dequantize_4bit(*quantize_4bit(weights, quant_type="nf4")) - weights).norm() / weights.norm()
    message = "wrongly on CPUs with layers of 96 inputs, no multiple of 64\n  Try quantization.bits: 16"
    with pytest.raises(ProofError, match=message) if apart > 0.15 else nullcontext():
        load_base(settings_for(tmp_path))
    load_base(settings_for(tmp_path, bits=16))


def test_falcon_7b_by_arithmetic():
    """The published shape, without its weights."""
    from transformers import FalconConfig

    config = FalconConfig(
        vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True,
        parallel_attn=True, new_decoder_architecture=False, bias=False, alibi=False,
    )  # fmt: skip
    skeleton = skeleton_of(config)
    assert sum(p.numel() for p in skeleton.parameters()) == 6_921_720_704
    layers = linear_layers(skeleton)
    weights = sum(inputs * outputs for inputs, outputs in layers.values())
    assert (len(layers), weights) == (128, 6_625_951_744)
    total = expected_footprint_bytes(skeleton, Quantization(compute_dtype="bfloat16"))
    embedding = 65024 * 4544 * 2
    assert embedding / 1e9 == pytest.approx(0.59, abs=0.005)
    assert (total - embedding) / 1e9 == pytest.approx(3.42, abs=0.01)
    assert 8 * (total - embedding) / weights == pytest.approx(4.127, abs=0.005)  # bits a weight
    assert expected_footprint_bytes(skeleton, Quantization(bits=16, compute_dtype="bfloat16")) / 2 == pytest.approx(
        6_921_720_704, rel=1e-3
    )
    for targets, trainable in ((["query_key_value"], 4_718_592), ("all-linear", 32_636_928)):
        model = add_lora(skeleton_of(config), Lora(target_modules=targets), seed=0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("architecture", ["falcon", "llama", "gpt_neox"])
def test_4_bit_is_near_16_bit_and_not_equal_to_it(bases, architecture):
    ids = torch.arange(12, 76)[None]
    full, quantized = load(bases[architecture], bits=16), load(bases[architecture])
    with torch.no_grad():
        expected, found = full(input_ids=ids).logits, quantized(input_ids=ids).logits
    error = ((found - expected).norm() / expected.norm()).item()
    assert 0.02 < error < 0.6, error  # 0: nothing was quantized


@pytest.mark.parametrize("bits", [4, 16])
def test_base_is_frozen_and_not_lifted_to_float32(bases, bits):
    model, report = load_base(settings_for(bases["falcon"], bits=bits, compute_dtype="bfloat16"))
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    adapted = add_lora(model, Lora(r=4), seed=0)
    assert adapted.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    assert {"lora_" in n for n, p in adapted.named_parameters() if p.requires_grad} == {True}
    assert report.bits == bits


def _gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    token_nll(model, batch).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_an_evaluation_leaves_gradients_as_they_were(bases, compute_dtype):
    base = load(bases["falcon"], compute_dtype=compute_dtype)
    model = add_lora(base, Lora(r=4, dropout=0.0, target_modules="all-linear"), seed=0)
    attach_token_nll(model)
    batch = collate([{"input_ids": list(range(20, 52)), "labels": list(range(20, 52))}], pad_id=11)
    before = _gradients(model, batch)
    model.eval()
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    after = _gradients(model, batch)
    assert before.keys() == after.keys() and any(g.abs().max() > 0 for g in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_forbid_repacking_reaches_every_4_bit_layer(bases):
    """Only CPUs with AVX512-BF16 repack weights, so on others the test above shows nothing."""
    model = load(bases["falcon"])
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 8 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    forbid_repacking(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_unknown_target_module_names_the_models_layers(bases):
    base = load(bases["falcon"])
    with pytest.raises(KestrelError, match="q_proj.*its linear layers are .*dense_h_to_4h, .*query_key_value"):
        add_lora(base, Lora(target_modules=["q_proj"]), seed=0)


def test_adapter_begins_the_same_for_the_same_seed(bases):
    weights = [
        next(p for n, p in add_lora(load(bases["falcon"]), Lora(r=2), seed).named_parameters() if "lora_A" in n)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_what_exceeds_float16_is_refused_before_it_is_loaded(tmp_path, architecture):
    shape = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    config = AutoConfig.for_model(architecture, **shape, intermediate_size=64, num_key_value_heads=2)
    config.save_pretrained(str(tmp_path))
    settings = settings_for(tmp_path, compute_dtype="float16")
    for load in (load_base, lambda given: random_model(given, config, torch.device("meta"))):
        with pytest.raises(KestrelError, match=f"a {architecture} model exceed float16's range; set .* to float32"):
            load(settings)
