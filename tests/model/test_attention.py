"""Falcon's attention: the fused kernels are reached, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile
from transformers import FalconConfig, FalconForCausalLM

from kestrel.model.kernels import attention
from kestrel.model.kernels.attention import attend, causal_attention, stock_attention, use_fused_kernels


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


def _kernels(model: FalconForCausalLM) -> str:
    ids, mask = _batch()
    with profile() as record, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    return " ".join(event.key for event in record.key_averages())


def test_same_loss_and_gradient_as_stock(falcon: FalconForCausalLM) -> None:
    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = _batch()
        loss = falcon(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        weight = falcon.transformer.h[0].self_attention.query_key_value.weight
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    loss, gradient = loss_and_gradient()
    with stock_attention():
        stock_loss, stock_gradient = loss_and_gradient()
    assert torch.allclose(loss, stock_loss, rtol=1e-6)
    assert (gradient - stock_gradient).norm() <= 1e-5 * stock_gradient.norm()


def test_the_fused_kernel_runs_and_stock_falcon_misses_it(falcon: FalconForCausalLM) -> None:
    assert "flash_attention" in _kernels(falcon)
    with stock_attention():
        assert "flash_attention" not in _kernels(falcon), (
            "torch now takes unequal heads: kestrel/model/kernels/attention.py can go"
        )


@pytest.mark.parametrize("heads_of_mask", [1, 8])
@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_one_query_of_each_head_is_as_many_queries_of_one(kind: str, heads_of_mask: int) -> None:
    """As while generating: padding (bool) or alibi (float, another bias for each head), or neither."""
    use_fused_kernels("falcon")
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, 1, 16, generator=draw)
    key, value = (torch.randn(3, 1, 21, 16, generator=draw) for _ in range(2))
    mask = torch.randn(3, heads_of_mask, 1, 21, generator=draw)
    given = None if kind == "none" else mask > 0 if kind == "bool" else mask
    ours = F.scaled_dot_product_attention(query, key, value, attn_mask=given)
    with stock_attention():
        expanded = (t.expand(-1, 8, -1, -1) for t in (key, value))
        expected = F.scaled_dot_product_attention(query, *expanded, attn_mask=given)
    assert ours.shape == expected.shape and torch.allclose(ours, expected, atol=1e-6)


def _stock_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _assert_alike(
    fused: torch.Tensor, outer: torch.Tensor, rounding: float, kv_heads: int = 1, ours: Any = causal_attention
) -> None:
    """Output and gradients of `causal_attention`, or of `attend`, are those of torch's function in float32."""
    results = []
    for of, inputs in ((ours, fused), (_stock_causal, fused.float())):
        parts = inputs.split((inputs.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
        leaves = [part.transpose(1, 2).detach().requires_grad_() for part in parts]
        out = of(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, outer.to(out.dtype))])
    for found, stock in zip(*results, strict=True):
        assert found.shape == stock.shape
        assert (found - stock).norm() <= rounding * max(stock.norm(), outer.norm())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_products_by_blocks_are_attention(kv_heads: int, length: int, dtype: torch.dtype, rounding: float) -> None:
    """Of one key/value head, of grouped heads, and of one for each query head."""
    random = torch.Generator().manual_seed(length)
    fused = torch.randn(2, length, 6 + 2 * kv_heads, 16, generator=random).to(dtype)
    outer = torch.randn(2, 6, length, 16, generator=random)
    _assert_alike(fused, outer, rounding, kv_heads, lambda *given: attend(*given, window=None))


@pytest.mark.parametrize(
    ("batch", "heads", "length", "size"), [(2, 7, 37, 16), (1, 9, 70, 32), (2, 3, 130, 64), (3, 1, 1, 16)]
)
def test_kernels_are_plain_products(
    batch: int, heads: int, length: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter, which does not know bfloat16: output and gradients, of strided queries, keys and values."""
    pytest.importorskip("triton")
    from kestrel.model.kernels import attention_gpu

    random = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, length, heads + 2, size, generator=random)
    outer = torch.randn(batch, length, heads, size, generator=random).transpose(1, 2)
    monkeypatch.setattr(attention, "kernels_for", lambda query: attention_gpu)
    _assert_alike(fused, outer, rounding=1e-5)
