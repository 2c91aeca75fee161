"""The GPU's kernels against the plain forms. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

pytest.importorskip("triton")

from kestrel.model.kernels import elementwise, elementwise_gpu


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_dropout_keeps_its_share_scaled_and_repeats() -> None:
    x = _random(37, 301).abs() + 1
    dropped = elementwise_gpu.dropout(x, 0.3, seed=12345678901234)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    share = kept.float().mean().item()
    assert share == pytest.approx(0.7, abs=4 * (0.3 * 0.7 / x.numel()) ** 0.5)
    # No pattern along rows or columns.
    assert (kept.float().mean(0) - 0.7).abs().max() < 0.45
    assert torch.equal(dropped, elementwise_gpu.dropout(x, 0.3, seed=12345678901234))
    other = elementwise_gpu.dropout(x, 0.3, seed=12345678901235) != 0
    assert (kept & other).float().mean().item() == pytest.approx(0.49, abs=0.02)


def test_dropout_is_added_with_the_same_mask() -> None:
    part, total = _random(5, 1000), _random(5, 1000, seed=1)
    expected = total + elementwise_gpu.dropout(part, 0.5, seed=3)
    result = elementwise_gpu.add_dropout_(total, part, 0.5, seed=3)
    assert result is total
    torch.testing.assert_close(result, expected)


def test_gelu_and_its_gradient() -> None:
    x, grad = _random(7, 333) * 3, _random(7, 333, seed=1)
    torch.testing.assert_close(elementwise_gpu.gelu(x), elementwise.gelu(x))
    expected = elementwise.gelu_backward_(grad.clone(), x)
    torch.testing.assert_close(elementwise_gpu.gelu_backward_(grad, x), expected)


def test_gelu_of_large_and_tiny_numbers() -> None:
    """The tail is within 1e-7 everywhere, and what is added to it in the gradient within rounding."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0])])
    exact = F.gelu(x.double())
    assert (elementwise_gpu.gelu(x).double() - exact).abs().max() < 2e-6
    ones = torch.ones_like(x)
    expected = elementwise.gelu_backward_(ones.double(), x.double())
    assert (elementwise_gpu.gelu_backward_(ones, x).double() - expected).abs().max() < 5e-7


@pytest.mark.parametrize("width", [7, 384, 5000])
@pytest.mark.parametrize("backward", [True, False])
def test_likelihoods_and_their_gradient(width: int, backward: bool) -> None:
    """Logits of one row differ by far more than a float holds of their exponentials."""
    logits = _random(6, width) * torch.tensor([0.0, 1.0, 10.0, 100.0, 1e4, 1.0])[:, None]
    targets = torch.randint(width, (6,), generator=torch.Generator().manual_seed(1))
    plain, kernel = logits.clone(), logits.clone()
    expected = elementwise.nll(plain, targets, backward)
    leaf = logits.clone().requires_grad_()
    own = F.cross_entropy(leaf, targets, reduction="none")
    torch.testing.assert_close(expected, own.detach())
    torch.testing.assert_close(elementwise_gpu.nll(kernel, targets, backward), expected)
    if backward:
        rounding = torch.finfo().eps * logits.abs().max().item()  # of a logit less the sum
        torch.testing.assert_close(kernel, plain, rtol=0, atol=rounding)
        torch.testing.assert_close(kernel, torch.autograd.grad(own.sum(), leaf)[0], rtol=0, atol=rounding)


def test_a_likelihood_that_is_no_number_stays_none() -> None:
    logits = _random(3, 50)
    logits[0, 7], logits[1, 9] = float("nan"), float("inf")
    found = elementwise_gpu.nll(logits, torch.tensor([1, 2, 3]), backward=False)
    assert torch.isfinite(found).tolist() == [False, False, True]


@pytest.mark.parametrize("size", [64, 100, 4544])
def test_norm_and_its_gradient(size: int) -> None:
    x, weight, bias = _random(5, size) * 2 + 1, _random(size, seed=1), _random(size, seed=2)
    plain, kernel = elementwise.norm(x, weight, bias, 1e-5), elementwise_gpu.norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(kernel[0], plain[0])
    torch.testing.assert_close(kernel[1], plain[1].flatten())
    torch.testing.assert_close(kernel[2], plain[2].flatten())
    grad, more = _random(5, size, seed=3), _random(5, size, seed=4)
    expected = elementwise.norm_backward(grad, x, plain[1], plain[2], weight, bias, more)
    torch.testing.assert_close(elementwise_gpu.norm_backward(grad, x, kernel[1], kernel[2], weight, more), expected)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_plain_dropout_keeps_its_share(p: float) -> None:
    x = torch.ones(301, 403)
    dropped = elementwise.dropout(x, p, seed=7)
    share = (dropped != 0).float().mean().item()
    assert share == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    assert torch.equal(dropped, elementwise.dropout(x, p, seed=7))
    assert not torch.equal(dropped, elementwise.dropout(x, p, seed=8))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (513, 64)])
def test_dequantization(kind: str, shape: tuple[int, int]) -> None:
    packed, state = quantize_4bit(_random(*shape), blocksize=64, compress_statistics=True, quant_type=kind)
    assert elementwise_gpu.dequantizes(state)
    dense = elementwise_gpu.dequantize(packed, state, torch.float32)
    torch.testing.assert_close(dense, dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("blocksize", "double"), [(64, False), (128, True)])
def test_other_layouts_are_left_to_bitsandbytes(blocksize: int, double: bool) -> None:
    state: Any = quantize_4bit(_random(64, 64), blocksize=blocksize, compress_statistics=double, quant_type="nf4")[1]
    assert not elementwise_gpu.dequantizes(state)
