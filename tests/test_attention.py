"""Falcon's attention: the fused kernels are reached, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile
from transformers import FalconConfig, FalconForCausalLM

from kestrel.attention import stock_attention, use_fused_kernels


@pytest.fixture(scope="module")
def falcon() -> FalconForCausalLM:
    torch.manual_seed(0)
    use_fused_kernels("falcon")
    config = FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, attn_implementation="sdpa",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return FalconForCausalLM(config)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    mask[2, :9] = 0
    return ids, mask


def _loss_and_gradient(model: FalconForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = _batch()
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.detach(), model.transformer.h[0].self_attention.query_key_value.weight.grad.clone()


def _kernels(model: FalconForCausalLM) -> str:
    ids, mask = _batch()
    with profile() as record, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    return " ".join(event.key for event in record.key_averages())


def test_same_loss_and_gradient_as_stock(falcon: FalconForCausalLM) -> None:
    loss, gradient = _loss_and_gradient(falcon)
    with stock_attention():
        stock_loss, stock_gradient = _loss_and_gradient(falcon)
    assert torch.allclose(loss, stock_loss, rtol=1e-6)
    assert (gradient - stock_gradient).norm() <= 1e-5 * stock_gradient.norm()


def test_the_fused_kernel_runs(falcon: FalconForCausalLM) -> None:
    assert "flash_attention" in _kernels(falcon)


def test_stock_falcon_misses_the_fused_kernel(falcon: FalconForCausalLM) -> None:
    with stock_attention():
        assert "flash_attention" not in _kernels(falcon), "torch now takes unequal heads: kestrel/attention.py can go"


def test_generation_is_the_same(falcon: FalconForCausalLM) -> None:
    ids, mask = _batch()
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = falcon.generate(input_ids=ids[2:], attention_mask=mask[2:], **arguments)
    with stock_attention():
        stock = falcon.generate(input_ids=ids[2:], attention_mask=mask[2:], **arguments)
    assert torch.equal(ours, stock)
