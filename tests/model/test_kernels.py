"""The GPU's kernels against their plain forms. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

pytest.importorskip("triton")

from kestrel.model.kernels import (
    attention,
    attention_gpu,
    elementwise,
    elementwise_gpu,
    low_rank,
    low_rank_gpu,
    rotary_gpu,
)

PLAIN_AND_KERNELS = (elementwise, elementwise_gpu)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_plain_dropout_keeps_its_share_scaled_and_repeats(p: float) -> None:
    x = _random(301, 403).abs() + 1
    dropped = low_rank.dropout(x, p, seed=12345678901234)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / (1 - p))
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    # No pattern along rows or columns.
    assert all((kept.float().mean(dim) - 1 + p).abs().max() < 0.2 for dim in (0, 1))
    assert torch.equal(dropped, low_rank.dropout(x, p, seed=12345678901234))
    other = low_rank.dropout(x, p, seed=12345678901235) != 0
    assert (kept & other).float().mean().item() == pytest.approx((1 - p) ** 2, abs=0.02)


@pytest.mark.parametrize("module", PLAIN_AND_KERNELS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_and_their_gradients(module: Any, activation: elementwise.Activation, gated: bool) -> None:
    before, grad = _random(7, 300 * (1 + gated)) * 3, _random(7, 300, seed=1)
    leaf = before.clone().requires_grad_()
    gate = leaf[:, :300]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=approximate)
    output = active * leaf[:, 300:] if gated else active
    (expected,) = torch.autograd.grad(output, leaf, grad)
    torch.testing.assert_close(module.activate(before, activation, gated), output.detach())
    for wanted in (True, False):
        of_before, result = before.clone(), grad.clone()
        result = torch.cat([result, before], dim=1)[:, :300]  # rows that lie apart
        module.activate_backward_(result, of_before, activation, gated, wanted)
        torch.testing.assert_close(of_before, expected)
        if wanted:
            torch.testing.assert_close(result, output.detach())


def test_gelu_of_large_and_tiny_numbers() -> None:
    """The tail is within 1e-7 everywhere, and what is added to it in the gradient within rounding."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0])])[None]
    exact = x.double().requires_grad_()
    F.gelu(exact).sum().backward()
    assert (elementwise_gpu.activate(x, "gelu", False).double() - F.gelu(exact)).abs().max() < 2e-6
    elementwise_gpu.activate_backward_(torch.ones_like(x), x, "gelu", False, False)
    assert (x.double() - exact.grad).abs().max() < 5e-7


@pytest.mark.parametrize("width", [7, 384, 5000])
@pytest.mark.parametrize("backward", [True, False])
def test_likelihoods_and_their_gradient(width: int, backward: bool) -> None:
    """Logits of one row differ by far more than a float holds of their exponentials."""
    logits = _random(6, width) * torch.tensor([0.0, 1.0, 10.0, 100.0, 1e4, 1.0])[:, None]
    targets = torch.randint(width, (6,), generator=torch.Generator().manual_seed(1))
    leaf = logits.clone().requires_grad_()
    own = F.cross_entropy(leaf, targets, reduction="none")
    rounding = torch.finfo().eps * logits.abs().max().item()  # of a logit less the sum
    for module in PLAIN_AND_KERNELS:
        overwritten = logits.clone()
        torch.testing.assert_close(module.nll(overwritten, targets, backward), own.detach())
        if backward:
            (expected,) = torch.autograd.grad(own.sum(), leaf, retain_graph=True)
            torch.testing.assert_close(overwritten, expected, rtol=0, atol=rounding)


def test_a_likelihood_that_is_no_number_stays_none() -> None:
    logits = _random(3, 50)
    logits[0, 7], logits[1, 9] = float("nan"), float("inf")
    found = elementwise_gpu.nll(logits, torch.tensor([1, 2, 3]), backward=False)
    assert torch.isfinite(found).tolist() == [False, False, True]


@pytest.mark.parametrize("module", PLAIN_AND_KERNELS)
@pytest.mark.parametrize(("kind", "offset"), [("layer", 0.0), ("rms", 0.0), ("rms", 1.0)])
@pytest.mark.parametrize("size", [64, 100, 4544])
def test_norms_and_their_gradients(module: Any, kind: str, offset: float, size: int) -> None:
    x, weight, bias = _random(5, size) * 2 + 1, _random(size, seed=1), _random(size, seed=2)
    grad, more = _random(5, size, seed=3), _random(5, size, seed=4)
    leaf = x.clone().requires_grad_()
    if kind == "layer":
        expected = F.layer_norm(leaf, (size,), weight, bias, 1e-5)
    else:
        bias, expected = None, F.rms_norm(leaf, (size,), weight + offset, 1e-5)
    (of_x,) = torch.autograd.grad(expected, leaf, grad)
    out, statistics = module.norm(x, weight, bias, 1e-5, offset)
    torch.testing.assert_close(out, expected.detach())
    wide = torch.cat([grad, more], dim=1)[:, :size]  # rows that lie apart
    for given in (grad, wide):
        torch.testing.assert_close(module.norm_backward(given, x, statistics, weight, bias, offset, more), of_x + more)


def test_norms_and_activations_leave_room_behind_rows_and_others_read_over_it_and_write_around_it() -> None:
    x, weight, a = _random(5, 128), _random(128), _random(16, 128)
    contiguous, (inverse,) = elementwise_gpu.norm(x, weight, None, 1e-5)
    apart, (same,) = elementwise_gpu.norm(x, weight, None, 1e-5, spare=48)
    assert torch.equal(apart, contiguous) and torch.equal(inverse, same) and apart.stride() == (176, 1)
    active = elementwise_gpu.activate(x, "silu", True, spare=16)
    assert torch.equal(active, elementwise_gpu.activate(x, "silu", True)) and active.stride() == (80, 1)
    grad_low = _random(5, 16)
    assert torch.equal(low_rank_gpu.project(apart, a, 0.3, 1), low_rank_gpu.project(contiguous, a, 0.3, 1))
    of_a = [low_rank_gpu.project_gradient(grad_low, each, 0.3, 1) for each in (apart, contiguous)]
    assert torch.equal(*of_a)
    packed, state = quantize_4bit(_random(7, 128), blocksize=64, compress_statistics=True, quant_type="nf4")
    whole = torch.full((7, 144), 9.0)
    elementwise_gpu.dequantize(packed, state, torch.float32, whole[:, :128])
    assert torch.equal(whole[:, :128], elementwise_gpu.dequantize(packed, state, torch.float32))
    assert (whole[:, 128:] == 9).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (513, 64)])
def test_dequantization(kind: str, shape: tuple[int, int]) -> None:
    packed, state = quantize_4bit(_random(*shape), blocksize=64, compress_statistics=True, quant_type=kind)
    assert elementwise._reads(packed, state)
    dense = elementwise_gpu.dequantize(packed, state, torch.float32)
    torch.testing.assert_close(dense, dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("blocksize", "double"), [(64, False), (128, True)])
def test_other_layouts_are_left_to_bitsandbytes(blocksize: int, double: bool) -> None:
    packed, state = quantize_4bit(_random(64, 64), blocksize=blocksize, compress_statistics=double, quant_type="nf4")
    assert not elementwise._reads(packed, state)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotated"), [(4, 2, 16, 16), (7, 1, 64, 64), (5, 5, 24, 24), (6, 3, 20, 12)]
)
def test_rotation(heads: int, kv_heads: int, size: int, rotated: int, back: bool) -> None:
    """Also of a part of each head, of heads of odd sizes, and in place."""
    cos, sin = (_random(9, rotated // 2, seed=seed).repeat(1, 2) for seed in (1, 2))
    fused = _random(2, 9, heads + 2 * kv_heads, size, seed=3)
    query, key, value = fused.split((heads, kv_heads, kv_heads), dim=2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # what attention's backward hands over
    plain, kernel = torch.empty_like(fused), torch.full_like(fused, float("nan"))
    elementwise.rotate((query, key, value), cos, sin, plain, back)
    rotary_gpu.rotate((query, key, value), cos, sin, kernel, back)
    torch.testing.assert_close(kernel, plain)
    rotary_gpu.rotate(fused.split((heads, kv_heads, kv_heads), dim=2), cos, sin, fused, back)
    torch.testing.assert_close(fused, plain)


def test_rotating_back_is_the_gradient() -> None:
    cos, sin = (_random(7, 4, seed=seed).repeat(1, 2) for seed in (1, 2))
    fused, grad = _random(2, 7, 5, 8, seed=3), _random(2, 7, 5, 8, seed=4)
    there, back = torch.empty_like(fused), torch.empty_like(fused)
    elementwise.rotate(fused.split((3, 1, 1), 2), cos, sin, there, back=False)
    elementwise.rotate(grad.split((3, 1, 1), 2), cos, sin, back, back=True)
    assert (there * grad).sum().item() == pytest.approx((fused * back).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "inputs", "ranks", "p"),
    [(70, 96, 16, 0.3), (130, 200, 48, 0.05), (33, 64, 3, 0.5), (40, 1100, 16, 0.1), (16, 32, 300, 0.2)],
)
def test_products_with_dropout_in_passing(tokens: int, inputs: int, ranks: int, p: float) -> None:
    """All three see one mask, which keeps its share and the mean."""
    x, a, grad_low = _random(tokens, inputs), _random(ranks, inputs, seed=1), _random(tokens, ranks, seed=2)
    eye, ones = torch.eye(inputs), torch.ones(tokens, inputs)

    def mask_of(seed: int) -> torch.Tensor:
        parts = (eye[first : first + 256].contiguous() for first in range(0, inputs, 256))
        return torch.cat([low_rank_gpu.project(ones, part, p, seed) for part in parts], 1)

    mask = mask_of(7)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert (mask > 0).float().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / mask.numel()) ** 0.5)
    assert not torch.equal(mask, mask_of(8))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(low_rank_gpu.project(x, a, p, 7), (x * mask) @ a.t(), **close)
    torch.testing.assert_close(low_rank_gpu.project_gradient(grad_low, x, p, 7), grad_low.t() @ (x * mask), **close)
    total = _random(tokens, inputs, seed=3)
    expected = total + (grad_low @ a) * mask
    low_rank_gpu.add_input_gradient_(total, grad_low, a, p, 7)
    torch.testing.assert_close(total, expected, **close)
    wide = _random(tokens, inputs + 16, seed=4)  # rows that lie apart
    rest, expected = wide[:, inputs:].clone(), wide[:, :inputs] + (grad_low @ a) * mask
    low_rank_gpu.add_input_gradient_(wide[:, :inputs], grad_low, a, p, 7)
    torch.testing.assert_close(wide[:, :inputs], expected, **close)
    assert torch.equal(wide[:, inputs:], rest)


def _described(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.shape, result.dtype, result.untyped_storage().nbytes()
    return None if result is None else [_described(part) for part in result]


def test_what_is_counted_on_the_meta_device_is_what_the_kernels_return(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow, weight, query = _random(4, 32), _random(4, 16), _random(32), _random(2, 9, 5, 16)
    a, key = _random(16, 32), _random(2, 1, 5, 16)
    packed, state = quantize_4bit(_random(64, 64), blocksize=64, compress_statistics=True, quant_type="nf4")
    statistics = elementwise.norm(wide, weight, weight, 1e-5)[1]
    out, sums = attention_gpu.attend(query, key, key)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (elementwise.activate, (wide, "silu", True)),
        (elementwise.activate, (wide, "gelu", False)),
        (elementwise.activate, (wide, "gelu", False, 16)),
        (elementwise.activate_backward_, (narrow, wide, "silu", True, True)),
        (elementwise.nll, (wide, torch.zeros(4, dtype=torch.long), False)),
        (elementwise.norm, (wide, weight, weight, 1e-5)),
        (elementwise.norm, (wide, weight, None, 1e-5)),
        (elementwise.norm, (wide, weight, None, 1e-5, 0.0, 16)),
        (elementwise.norm_backward, (wide, wide, statistics, weight, weight, 0.0, wide)),
        (elementwise.dequantize, (packed, state, torch.float16)),
        (low_rank.project, (wide, a, 0.5, 1)),
        (low_rank.project_gradient, (narrow, wide, 0.5, 1)),
        (low_rank.add_input_gradient_, (wide, narrow, a, 0.5, 1)),
    ]
    for function, arguments in calls:
        found = []
        for place in ("triton", "meta"):
            monkeypatch.setattr(elementwise, "place_of", lambda x, place=place: place)
            found.append(_described(function(*arguments)))
        assert found[0] == found[1], function.__name__
    assert _described(attention.OnShapes.attend(query, key, key)) == _described((out, sums))
    of_shapes, of_kernels = (
        module.attend_backward(query, query, key, key, out, sums) for module in (attention.OnShapes, attention_gpu)
    )
    assert _described(of_shapes) == _described(of_kernels)
    assert attention.OnShapes.HEADS_PER_BLOCK == attention_gpu._OF_KEYS["HEADS"]
