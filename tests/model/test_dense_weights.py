"""While answers are made, 4-bit weights are dense where there is room, and compute the same."""

from __future__ import annotations

import pytest
import torch
from make_models import settings_of, write_base

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Lora, Quantization
from kestrel.model import dense_weights as module
from kestrel.model.base import load_base
from kestrel.model.dense_weights import dense_weights
from kestrel.model.kernels import cards
from kestrel.model.loss import attach_token_nll, fast_layers_of, token_nll


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["falcon", "qwen2"])  # qwen2 has biases
def test_logits_are_the_same_to_the_bit(tmp_path, monkeypatch, architecture, dtype):
    base = write_base(tmp_path / "base", architecture)
    model, _ = load_base(settings_of(base, quantization=Quantization(compute_dtype=dtype)))
    model = add_lora(model, Lora(r=2, target_modules="all-linear"), seed=0).eval()
    attach_token_nll(model)
    ids, dequantized = torch.arange(12, 52)[None], []
    batch = {"input_ids": ids, "labels": ids, "predicting": torch.arange(39)}
    own = module.FrozenWeight.dense
    monkeypatch.setattr(
        module.FrozenWeight, "dense", lambda *given, **named: (dequantized.append(1), own(*given, **named))[1]
    )
    with torch.no_grad():
        expected, likelihoods = model(input_ids=ids).logits, token_nll(model, batch)
        dequantized.clear()
        with dense_weights(model) as fits:
            assert fits and torch.equal(model(input_ids=ids).logits, expected)
            assert fast_layers_of(model).is_dense() and torch.equal(token_nll(model, batch), likelihoods)
        assert len(dequantized) == sum(hasattr(layer, "quant_state") for layer in model.modules())
        assert not fast_layers_of(model).is_dense() and torch.equal(token_nll(model, batch), likelihoods)
        assert torch.equal(model(input_ids=ids).logits, expected)
        monkeypatch.setattr(module, "free_memory", lambda device: 1000)
        with dense_weights(model) as fits:
            assert (
                not fits and not fast_layers_of(model).is_dense() and torch.equal(model(input_ids=ids).logits, expected)
            )


def test_training_that_keeps_weights_dense_keeps_them_through_answers(tmp_path, monkeypatch):
    model, _ = load_base(settings_of(write_base(tmp_path / "base")))
    model = add_lora(model, Lora(r=16, dropout=0.0, target_modules="all-linear"), seed=0).train()
    ids = torch.arange(12, 52)[None]
    batch = {"input_ids": ids, "labels": ids, "predicting": torch.arange(39)}
    attach_token_nll(model)
    expected = token_nll(model, batch)
    attach_token_nll(model, "dense")
    kept = token_nll(model, batch)
    assert fast_layers_of(model).is_dense() and torch.allclose(kept, expected, rtol=1e-2)
    monkeypatch.setattr(module.FrozenWeight, "dense", None)  # from here on nothing is made dense again
    with torch.no_grad(), dense_weights(model) as fits:
        assert fits and model(input_ids=ids).logits.isfinite().all()
    token_nll(model, batch).sum().backward()


def test_few_rows_on_an_old_card_take_the_fused_product(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "capability", lambda: (7, 5))
    model, _ = load_base(settings_of(write_base(tmp_path / "base")))
    layer, own = model.transformer.h[0].mlp.dense_h_to_4h, []
    plain = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda *given: (own.append(1), plain(*given))[1])
    with torch.no_grad(), dense_weights(model):
        for rows, expected in ((32, 1), (33, 1)):
            layer(torch.zeros(rows, 1, 64, dtype=torch.bfloat16))
            assert len(own) == expected
