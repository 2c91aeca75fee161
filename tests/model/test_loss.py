"""The objective equals the textbook's, wherever tokens stand and however they are cut."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from make_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM

import kestrel.model.loss
from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Lora
from kestrel.errors import ProofError
from kestrel.model.loss import attach_token_nll, collate, prove_loss, token_nll

END = 11  # end token and padding at once, as for Falcon


def rows_of(lengths: list[int], seed: int) -> list[dict[str, list[int]]]:
    """Random rows whose supervised spans end in the end token, and which hold end tokens that are not supervised."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = draw.integers(11, 380, size=length)
        supervised = draw.random(length) < 0.4
        supervised[[1, -1]], ids[-1] = True, END
        rows.append({"input_ids": ids.tolist(), "labels": np.where(supervised, ids, -100).tolist()})
    return rows


@pytest.fixture(scope="module")
def model():
    adapted = add_lora(make_model().requires_grad_(False), Lora(r=4, dropout=0.0, target_modules="all-linear"), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    attach_token_nll(adapted)
    return adapted


def test_a_model_that_is_prepared_again_keeps_nothing_of_the_first_time():
    """As chat.py does for each adapter."""
    model = make_model()
    own = model.forward
    attach_token_nll(model)
    first = weakref.ref(model.forward.fast_layers)
    attach_token_nll(model)
    gc.collect()
    assert first() is None and model.forward.own_forward == own


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("chunk", [1, 7, 20, 1024])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_models_own_loss_and_gradients(model, monkeypatch, chunk, training):
    monkeypatch.setattr(kestrel.model.loss, "CHUNK", chunk)
    model.train(training)
    batch = collate(rows_of([5, 31, 18], seed=chunk), pad_id=END)
    nll, own = token_nll(model, batch), model(**batch).loss
    assert nll.dtype == torch.float32 and nll.shape == ((batch["labels"][:, 1:] != -100).sum(),)
    assert torch.allclose(nll.mean(), own, rtol=1e-5)
    ours, theirs = gradients(model, nll.mean()), gradients(model, own)
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6 * theirs[name].abs().max() + 1e-8), name


@pytest.mark.parametrize("architecture", ["falcon", "gpt2"])
def test_autocast_changes_nothing(architecture):
    """The Trainer casts by itself in float16, where norms would return float32 and the head's product fail."""
    causal_lm = make_model(architecture).eval()
    attach_token_nll(causal_lm)
    batch = collate(rows_of([20, 9], seed=0), END)
    expected = token_nll(causal_lm, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_nll(causal_lm, batch), expected)


def test_no_supervised_token_is_no_loss(model):
    batch = collate([{"input_ids": [20, 21], "labels": [-100, -100]}], pad_id=END)
    assert token_nll(model, batch).shape == (0,)


def test_first_token_is_not_predicted_and_padding_is_not_learned(model):
    batch = collate([{"input_ids": [END, 21, END], "labels": [END, 21, END]}, {"input_ids": [20], "labels": [20]}], END)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[END, 21, END], [20, -100, -100]]
    assert token_nll(model, batch).shape == (2,)


@pytest.mark.parametrize("architecture", ["falcon", "llama", "gpt_neox", "qwen2", "gpt2"])
def test_proof_passes_for_plain_heads(architecture):
    model = make_model(architecture)
    attach_token_nll(model)
    model.train()
    prove_loss(model, collate(rows_of([20], seed=0), END), "float32")
    assert model.training


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 1.0}),
    ],
)
def test_logits_that_change_after_the_head(architecture, changes, monkeypatch):
    """The scale or bound of known architectures is followed, to the adapter's gradient; an unknown one is refused."""
    shape = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "pad_token_id": 0, "initializer_range": 0.15,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **shape, **changes)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = add_lora(base, Lora(r=4, dropout=0.0, target_modules="all-linear"), seed=0)
    own_forward = model.get_base_model().forward
    attach_token_nll(model)
    batch = collate(rows_of([20], seed=0), END)
    prove_loss(model, batch, "float32")
    own_loss = own_forward(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    ours, own = (
        torch.cat([gradient.flatten() for gradient in gradients(model, loss).values()])
        for loss in (token_nll(model, batch).mean(), own_loss)
    )
    assert torch.linalg.norm(ours - own) < 1e-4 * torch.linalg.norm(own) > 0

    monkeypatch.setattr(kestrel.model.loss, "_after_head", lambda causal_lm: (1.0, None))
    with pytest.raises(ProofError, match="differs from this architecture's own"):
        prove_loss(model, batch, "float32")


@pytest.mark.parametrize("hooked", [False, True], ids=["frozen head", "head for autograd"])
def test_full_logits_never_exist(model, monkeypatch, hooked):
    """The head sees supervised positions only, and no more than a chunk of them at once."""
    monkeypatch.setattr(kestrel.model.loss, "CHUNK", 8)
    seen = []
    if hooked:
        head = model.get_base_model().get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    else:
        stock = torch.log_softmax
        monkeypatch.setattr(
            torch, "log_softmax", lambda logits, *a, **k: (seen.append(len(logits)), stock(logits, *a, **k))[1]
        )
    batch = collate(rows_of([30, 20], seed=3), pad_id=END)
    nll = token_nll(model, batch)
    if hooked:
        hook.remove()
    assert max(seen) <= 8 and sum(seen) == len(nll) < batch["input_ids"].numel() / 2
