"""The GPU's kernels of the fast layers against their plain forms. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kestrel.model.kernels import gated, gated_gpu, low_rank_gpu, rotary, rotary_gpu


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    rotary.rotate((query, key, value), cos, sin, plain, back)
    rotary_gpu.rotate((query, key, value), cos, sin, kernel, back)
    torch.testing.assert_close(kernel, plain)
    rotary_gpu.rotate(fused.split((heads, kv_heads, kv_heads), dim=2), cos, sin, fused, back)
    torch.testing.assert_close(fused, plain)


def test_rotating_back_is_the_gradient() -> None:
    cos, sin = (_random(7, 4, seed=seed).repeat(1, 2) for seed in (1, 2))
    fused, grad = _random(2, 7, 5, 8, seed=3), _random(2, 7, 5, 8, seed=4)
    there, back = torch.empty_like(fused), torch.empty_like(fused)
    rotary.rotate(fused.split((3, 1, 1), 2), cos, sin, there, back=False)
    rotary.rotate(grad.split((3, 1, 1), 2), cos, sin, back, back=True)
    assert (there * grad).sum().item() == pytest.approx((fused * back).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "inputs", "ranks", "p"), [(70, 96, 16, 0.3), (130, 200, 48, 0.05), (33, 64, 3, 0.5), (40, 1100, 16, 0.1)]
)
def test_products_with_dropout_in_passing(tokens: int, inputs: int, ranks: int, p: float) -> None:
    """All three see one mask, which keeps its share and the mean."""
    x, a, grad_low = _random(tokens, inputs), _random(ranks, inputs, seed=1), _random(tokens, ranks, seed=2)
    eye, ones = torch.eye(inputs), torch.ones(tokens, inputs)
    parts = [low_rank_gpu.project(ones, eye[first : first + 16].contiguous(), p, 7) for first in range(0, inputs, 16)]
    mask = torch.cat(parts, 1)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    kept = (mask > 0).float()
    assert kept.mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / mask.numel()) ** 0.5)
    assert not torch.equal(
        mask, torch.cat([low_rank_gpu.project(ones, eye[:16].contiguous(), p, 8)] * len(parts), 1)[:, :inputs]
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(low_rank_gpu.project(x, a, p, 7), (x * mask) @ a.t(), **close)
    torch.testing.assert_close(low_rank_gpu.project_gradient(grad_low, x, p, 7), grad_low.t() @ (x * mask), **close)
    total = _random(tokens, inputs, seed=3)
    expected = total + (grad_low @ a) * mask
    low_rank_gpu.add_input_gradient_(total, grad_low, a, p, 7)
    torch.testing.assert_close(total, expected, **close)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations(activation: gated.Activation) -> None:
    both, grad = _random(7, 2 * 300), _random(7, 300, seed=1)
    output = gated.gated(both, activation)
    torch.testing.assert_close(gated_gpu.gated(both, activation), output)
    leaf = both.clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    active = (
        torch.nn.functional.silu(gate)
        if activation == "silu"
        else torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    )
    (expected,) = torch.autograd.grad(active * up, leaf, grad)
    for module in (gated, gated_gpu):
        both_, grad_ = both.clone(), grad.clone()
        module.gated_backward_(grad_, both_, activation)
        torch.testing.assert_close(both_, expected)
        torch.testing.assert_close(grad_, output)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    x, weight, grad, residual = _random(5, 96), _random(96, seed=1), _random(5, 96, seed=2), _random(5, 96, seed=3)
    leaf = x.clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(leaf, (96,), weight + offset, 1e-6)
    (of_x,) = torch.autograd.grad(expected, leaf, grad)
    for module in (gated, gated_gpu):
        out, inverse = module.rms_norm(x, weight, 1e-6, offset)
        torch.testing.assert_close(out, expected.detach())
        back = module.rms_norm_backward(grad, x, inverse, weight, offset, residual)
        torch.testing.assert_close(back, of_x + residual)
