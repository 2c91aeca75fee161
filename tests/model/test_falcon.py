"""Falcon's own training layer against transformers': the same loss, the same LoRA gradients, whatever is recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from make_models import write_base
from torch import nn

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Data, Lora, Model, Quantization, Settings
from kestrel.model.base import load_base
from kestrel.model.decoder_layer import Recompute
from kestrel.model.loss import attach_token_nll, causal_lm_of, collate, token_nll

ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_base(tmp_path_factory.mktemp("falcon") / "base"))


def _model(base: Path, dtype: str, targets: list[str], dropout: float = 0.0, bits: int = 4) -> Any:
    settings = Settings(
        run_dir="unused",
        data=Data(source="unused"),
        model=Model(name=str(base)),
        quantization=Quantization(compute_dtype=dtype, bits=bits),
        lora=Lora(target_modules=targets, dropout=dropout),
    )
    model = add_lora(load_base(settings)[0], settings.lora, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins at zero, where A has no gradient
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def _batch() -> dict[str, torch.Tensor]:
    """Three rows of different lengths, padded on the right with a token that also stands in the text."""
    random = torch.Generator().manual_seed(2)
    rows = []
    for length in (23, 40, 9):
        ids = torch.randint(12, 300, (length,), generator=random).tolist()
        labels = [token if place % 3 else -100 for place, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return collate(rows, pad_id=20)


def _library_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = causal_lm_of(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("targets", [["query_key_value"], ["dense_4h_to_h"], ALL], ids=["qkv", "down", "all"])
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 4), ("float32", 16), ("bfloat16", 4)])
def test_loss_and_gradients_are_the_librarys(
    base: Path, dtype: str, bits: int, targets: list[str], recompute: Recompute
) -> None:
    model, batch = _model(base, dtype, targets, bits=bits), _batch()
    theirs = _library_loss(model, batch)
    expected = _gradients(model, theirs)
    attach_token_nll(model, recompute)
    stock = causal_lm_of(model).transformer.h[0].forward
    causal_lm_of(model).transformer.h[0].forward = None  # must not be called
    ours = token_nll(model, batch).sum()
    causal_lm_of(model).transformer.h[0].forward = stock
    found = _gradients(model, ours)
    rounding = 1e-5 if dtype == "float32" else 2e-2
    assert ours.item() == pytest.approx(theirs.item(), rel=rounding)
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < rounding


def test_repeats_are_a_matter_of_speed(base: Path) -> None:
    """Dropout included, which is drawn for each place."""
    model, batch = _model(base, "float32", ["query_key_value"], dropout=0.3), _batch()
    attach_token_nll(model)
    without = {name: tensor for name, tensor in batch.items() if name not in ("first", "which")}
    assert len(batch["first"]) < batch["input_ids"].numel()
    results = []
    for given in (batch, without):
        torch.manual_seed(6)
        results.append(_gradients(model, token_nll(model, given).sum()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5 * results[1].abs().max().item())


def test_dropout_drops_its_share_and_keeps_the_mean(base: Path) -> None:
    """The update's mean over many draws is the update without dropout, and no two draws are alike."""
    model, batch = _model(base, "float32", ["query_key_value"], dropout=0.4), _batch()
    attach_token_nll(model)
    torch.manual_seed(4)
    with torch.no_grad():
        draws = torch.stack([token_nll(model, batch) for _ in range(200)])
        model.eval()
        without = token_nll(model, batch)
    spread = draws.std(0)
    assert (spread > 0).float().mean() > 0.9  # the first tokens of a row see little
    # A nonlinear function of a noisy input is biased in the second order of the noise; the first order must vanish.
    assert ((draws.mean(0) - without).abs() < 6 * spread / 200**0.5 + spread**2 + 1e-6).float().mean() > 0.95


def test_gradient_of_a_dropout_draw(base: Path) -> None:
    """The backward pass uses the mask of the forward pass: a step against the gradient lowers the same draw's loss."""
    model, batch = _model(base, "float32", ["query_key_value"], dropout=0.5), _batch()
    attach_token_nll(model)
    torch.manual_seed(5)
    loss = token_nll(model, batch).sum()
    gradient = _gradients(model, loss)
    step = 1e-3 / gradient.norm()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= step * parameter.grad
    torch.manual_seed(5)
    after = token_nll(model, batch).sum()
    predicted = (step * gradient.square().sum()).item()
    assert (loss - after).item() == pytest.approx(predicted, rel=0.1)


def test_padding_reaches_nothing(base: Path) -> None:
    model = _model(base, "float32", ["query_key_value"])
    attach_token_nll(model)
    batch = _batch()
    for told in ("first", "which"):  # of places with the same token, padding among them
        del batch[told]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][batch["attention_mask"] == 0] = 7
    with torch.no_grad():
        assert torch.equal(token_nll(model, batch), token_nll(model, other))


def test_without_its_adapter_it_is_the_base(base: Path) -> None:
    model, batch = _model(base, "float32", ALL).eval(), _batch()
    attach_token_nll(model)
    with torch.no_grad(), model.disable_adapter():
        ours = token_nll(model, batch).sum()
        theirs = _library_loss(model, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_hooked_layers_are_left_to_the_library(base: Path) -> None:
    model, batch = _model(base, "float32", ["query_key_value"]), _batch()
    attach_token_nll(model)
    seen = []
    handle = causal_lm_of(model).transformer.h[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    with_hook = token_nll(model, batch)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(token_nll(model, batch), with_hook, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
