"""Groups of frozen layers with LoRA updates: in which order they add, and what dropout does to an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantize_layers import quantize
from torch import nn

from kestrel.model import projection


def group_of(count: int, bias: bool, dtype: torch.dtype, std: float, kind: str = "16 bit") -> tuple[Any, Any, Any]:
    """A group of layers, B of this standard deviation; their bases; and their updates' products in float64, joined."""
    torch.manual_seed(0)
    names = [str(index) for index in range(count)]
    layers = nn.ModuleDict({name: nn.Linear(64, 64, bias=bias) for name in names}).to(dtype).requires_grad_(False)
    if kind != "16 bit":
        quantize(layers, kind, dtype)
    model: Any = get_peft_model(layers, LoraConfig(r=8, target_modules=names))
    adapted = [model.base_model.model[name] for name in names]
    for layer in adapted:
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.float()
        layer.lora_B["default"].weight.data = torch.randn(64, 8) * std
    group = projection.Group(adapted)
    projection.refresh([group], dtype)
    updates = [
        layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        for layer in adapted
    ]
    return group, [layer.get_base_layer() for layer in adapted], torch.cat(updates).detach()


@pytest.mark.parametrize(("dtype", "last_place"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("kind", ["nf4", "16 bit"])
@pytest.mark.parametrize(("count", "bias", "residual"), [(1, False, 0.0), (1, True, 30.0), (3, True, 0.0)])
def test_training_in_16_bits_keeps_an_update_that_is_less_than_their_last_place(
    dtype: torch.dtype, last_place: float, kind: str, count: int, bias: bool, residual: float
) -> None:
    """Each output is rounded, but their mean is right: regressed on the update, the difference that it makes is itself."""
    group, bases, update = group_of(count, bias, dtype, 0.05 * last_place * max(1.0, residual), kind)
    x = torch.randn(4000, 64).to(dtype)
    plus = (torch.randn(4000, 64 * count) * residual).to(dtype) if residual else None
    weights = torch.cat([projection.FrozenWeight(base).dense(dtype) for base in bases]).double()
    expected = x.double() @ weights.t() + (torch.cat([base.bias for base in bases]).double() if bias else 0.0)
    expected += plus.double() if plus is not None else 0.0
    small = x.double() @ update.t()
    assert small.abs().median() < 0.25 * last_place * expected.abs().median()
    made = group.forward(x, 0, plus)[0].double() - expected
    share, noise = (made * small).sum() / small.square().sum(), (made - small).square().mean().sqrt() / small.norm()
    assert noise < 0.05
    assert share.item() == pytest.approx(1.0, abs=4 * noise.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_in_float32_and_outside_training_the_frozen_product_comes_first(bias: bool, dtype: torch.dtype) -> None:
    """To the bit: a float32 run gives the adapter that it gave, and likelihoods are those of PEFT's order of sums."""
    group, (base,), _ = group_of(1, bias, dtype, 1e-4)
    x, plus = torch.randn(50, 64).to(dtype), torch.randn(50, 64).to(dtype)
    low, before = x @ group._a.t(), plus.clone()
    alone = group._product(x, None).addmm_(low, group._b.t())
    expected = [alone, alone + plus]
    if dtype == torch.float32:  # the sum goes on from `plus`
        onto = plus + base.bias if bias else plus.clone()
        expected[1] = onto.addmm_(x, base.weight.t()).addmm_(low, group._b.t())
    for training in (True, False):
        group._switch.train(training)
        found = [group.forward(x, 0)[0], group.forward(x, 0, plus)[0]]
        same = [torch.equal(each, sums) for each, sums in zip(found, expected, strict=True)]
        assert same == [dtype == torch.float32 or not training] * 2
    assert torch.equal(plus, before)


def test_an_update_within_the_frozen_product_is_the_update() -> None:
    """Where a norm left room behind the rows of the input, as it does on a GPU."""
    layers = {"q_proj": 64, "k_proj": 32}
    base = nn.ModuleDict({name: nn.Linear(128, outputs) for name, outputs in layers.items()})
    quantize(base, "nf4", torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_dropout=0.3, target_modules=list(layers))).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    group = projection.Group([model.base_model.model[name] for name in layers], has_room=True)
    projection.refresh([group], torch.float32)
    assert group.spare == 32
    room = torch.full((6, 192), float("nan"))
    x = room[:, :128].copy_(torch.randn(6, 128))
    (y, low), (expected, of_contiguous) = group.forward(x, 5), group.forward(x.contiguous(), 5)
    torch.testing.assert_close(y, expected)
    assert torch.equal(low, of_contiguous) and torch.equal(room[:, 128:160], low)
    with model.disable_adapter():
        assert group.spare == 0 and torch.equal(group.forward(x, 5)[0], group.forward(x.contiguous(), 5)[0])


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_keeps_the_mean_and_has_the_variance_of_theory(p: float) -> None:
    """Of an update s dropout(x) Aᵀ Bᵀ: its mean is s x Aᵀ Bᵀ, and each input adds p / (1 - p) of its own square."""
    x, layer = torch.randn(3, 64), nn.Linear(64, 40, bias=False).requires_grad_(False)
    wrapped = get_peft_model(nn.ModuleDict({"layer": layer}), LoraConfig(r=8, lora_dropout=p, target_modules=["layer"]))
    lora: Any = wrapped.base_model.model["layer"].train()
    nn.init.normal_(lora.lora_B["default"].weight)
    group, count = projection.Group([lora]), 4000
    projection.refresh([group], torch.float32)
    draws = torch.stack([group.forward(x, seed)[0] - layer(x) for seed in range(count)])
    product = (lora.lora_B["default"].weight @ lora.lora_A["default"].weight).detach() * lora.scaling["default"]
    mean, variance = x @ product.t(), (x.square() @ product.square().t()) * p / (1 - p)
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.25, atol=0)
    assert (draws.var(0).sum() / variance.sum()).item() == pytest.approx(1, abs=0.03)
