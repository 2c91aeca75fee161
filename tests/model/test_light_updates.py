"""While answers are made, LoRA's updates are in the compute type, and are PEFT's up to rounding."""

from __future__ import annotations

import pytest
import torch
from make_models import settings_of, write_base

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Lora, Quantization
from kestrel.model.base import load_base
from kestrel.model.dense_weights import dense_weights
from kestrel.model.light_updates import light_updates


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("architecture", ["falcon", "qwen2"])
def test_logits_are_pefts_up_to_rounding(tmp_path, architecture, dtype, tolerance):
    model, _ = load_base(
        settings_of(write_base(tmp_path / "base", architecture), quantization=Quantization(compute_dtype=dtype))
    )
    model = add_lora(model, Lora(r=4, target_modules="all-linear"), seed=0).eval()
    ids = torch.arange(12, 52)[None]
    with torch.no_grad():
        base = model(input_ids=ids).logits  # B is zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        expected = model(input_ids=ids).logits
        with light_updates(model):
            found = model(input_ids=ids).logits
            with dense_weights(model):
                assert torch.equal(model(input_ids=ids).logits, found)
        assert (found - expected).norm() < tolerance * (expected - base).norm()
        assert dtype == "float32" or not torch.equal(found, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)
        with model.disable_adapter(), light_updates(model):
            assert torch.equal(model(input_ids=ids).logits, base)
