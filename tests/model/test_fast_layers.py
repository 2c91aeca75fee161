"""The fast layers against transformers' and PEFT's: the same loss and the same LoRA gradients, for each architecture."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import transformers
from described_models import MODELS, SMALL, make_described
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model

from kestrel.errors import ProofError
from kestrel.model import projection
from kestrel.model.architecture import describe
from kestrel.model.decoder_layer import Recompute
from kestrel.model.fast_layers import FastBackbone
from kestrel.model.kernels import elementwise
from kestrel.model.layer_proof import prove_layers
from kestrel.model.loss import attach_token_nll, causal_lm_of, collate, nll_of_hidden, token_nll
from kestrel.model.projection import Repeats


def batch() -> dict[str, torch.Tensor]:
    """Three rows of different lengths, padded on the right with a token that also stands in the text."""
    random = torch.Generator().manual_seed(2)
    rows = []
    for length in (23, 40, 9):
        ids = torch.randint(12, 300, (length,), generator=random).tolist()
        rows.append({"input_ids": ids, "labels": [t if place % 3 else -100 for place, t in enumerate(ids)]})
    return collate(rows, pad_id=20)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.requires_grad}


def library_loss(model: Any) -> torch.Tensor:
    b = batch()
    logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), b["labels"][:, 1:].flatten(), reduction="sum")


def fast_loss(model: Any, recompute: Recompute) -> torch.Tensor:
    causal_lm, b = causal_lm_of(model), batch()
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    architecture = describe(backbone)
    assert architecture is not None
    fast = FastBackbone(backbone, architecture, recompute)
    assert fast.can_run()
    hidden = fast.hidden_states(b["input_ids"], b["predicting"], Repeats(b["first"], b["which"]))
    return nll_of_hidden(causal_lm, hidden, b["labels"].flatten()[b["predicting"] + 1]).sum()


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert all(gradient.norm() > 0 for gradient in expected.values())
    return max(((found[name] - g).norm() / g.norm()).item() for name, g in expected.items())


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_the_librarys(name: str, recompute: Recompute) -> None:
    model = make_described(name, torch.float32)
    theirs = library_loss(model)
    expected = gradients(model, theirs)
    ours = fast_loss(model, recompute)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert apart(gradients(model, ours), expected) < 1e-4


@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_an_adapter_on_an_embedding_that_scales(name: str) -> None:
    model = make_described(name, torch.float32, ["embed_tokens", "q_proj"])
    for parameter_name, parameter in model.named_parameters():
        if "lora_embedding_A" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs = library_loss(model)
    expected = gradients(model, theirs)
    ours = fast_loss(model, "none")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert apart(gradients(model, ours), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen2", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("falcon", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_adapter_on_any_base(name: str, layers: list[str], data: st.DataObject) -> None:
    """Any of the linear layers, rank and scaling; frozen weights in NF4, FP4 or as they are; in each type."""
    targets = data.draw(st.sets(st.sampled_from(layers), min_size=1))
    rank, rslora = data.draw(st.integers(1, 256)), data.draw(st.booleans())
    kind = data.draw(st.sampled_from(["nf4", "fp4", "16 bit"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    model = make_described(name, dtype, sorted(targets), kind, r=rank, use_rslora=rslora)
    theirs = library_loss(model)
    expected = gradients(model, theirs)
    ours = fast_loss(model, data.draw(st.sampled_from(["dense", "none", "mlp", "full"])))
    found, rounding = gradients(model, ours), {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]
    assert ours.item() == pytest.approx(theirs.item(), rel=rounding)
    flat, of_library = (torch.cat([g.flatten() for g in each.values()]) for each in (found, expected))
    assert (flat - of_library).norm() / of_library.norm() < rounding


@pytest.mark.parametrize("name", ["qwen2", "gemma", "phi3"])
def test_in_bfloat16_as_near_to_float32_as_the_librarys(name: str) -> None:
    wide, narrow = make_described(name, torch.float32), make_described(name, torch.bfloat16)
    exact = gradients(wide, library_loss(wide))
    theirs, ours = gradients(narrow, library_loss(narrow)), gradients(narrow, fast_loss(narrow, "none"))
    flat = [torch.cat([g.flatten() for g in each.values()]) for each in (exact, theirs, ours)]
    of_theirs, of_ours = ((each - flat[0]).norm() / flat[0].norm() for each in flat[1:])
    assert of_ours < 1.3 * of_theirs < 0.5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "falcon"])
def test_recomputing_changes_no_bit_dropout_included(name: str) -> None:
    results = []
    for recompute in ("dense", "none", "mlp", "full"):
        model = make_described(name, torch.float32, kind="nf4", lora_dropout=0.3)
        torch.manual_seed(3)
        loss = fast_loss(model, recompute)  # type: ignore[arg-type]
        results.append((loss.detach(), gradients(model, loss)))
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(found[name], g) for name, g in results[0][1].items())


@pytest.mark.parametrize(("recompute", "times"), [("none", 4), ("mlp", 5), ("full", 6)])
def test_the_narrow_side_of_an_update_is_made_again_only_with_its_layer(
    recompute: Recompute, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = make_described("falcon", torch.float32, lora_dropout=0.3), []
    own = projection.project
    monkeypatch.setattr(projection, "project", lambda *given: made.append(1) or own(*given))
    fast_loss(model, recompute).backward()
    assert len(made) == times * SMALL["num_hidden_layers"]  # four groups a layer


def test_what_is_not_described_is_left_to_transformers() -> None:
    for config in (
        transformers.LlamaConfig(**SMALL, attention_dropout=0.1),
        transformers.LlamaConfig(**SMALL, hidden_act="relu"),
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320),
        transformers.Gemma3TextConfig(**SMALL, head_dim=16, attn_logit_softcapping=50.0),
        transformers.Gemma2Config(**{**SMALL, "attn_implementation": "eager"}, head_dim=16),
    ):
        causal_lm = transformers.AutoModelForCausalLM.from_config(config)
        assert describe(getattr(causal_lm, causal_lm.base_model_prefix)) is None


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_layers_of_a_repositorys_own_code_are_not_taken_for_transformers(name: str) -> None:
    causal_lm = causal_lm_of(make_described(name, torch.float32))
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    assert describe(backbone) is not None
    module = f"transformers_modules.somebody.model.modeling_{name}"  # as `trust_remote_code` imports it
    backbone.__class__ = type("Own", (type(backbone),), {"__module__": module})
    assert describe(backbone) is None


def test_a_pass_without_supervised_tokens_has_gradients_of_zero() -> None:
    model = make_described("llama", torch.float32, ["q_proj"])
    attach_token_nll(model)
    nothing = collate([{"input_ids": [20, 21, 22], "labels": [-100] * 3}], pad_id=20)
    loss = token_nll(model, nothing).sum()
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["qwen2", "falcon"])
def test_the_proof_leaves_everything_as_it_was_and_sees_a_wrong_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_described(name, torch.float32, lora_dropout=0.3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach_token_nll(model)
    state = torch.get_rng_state()
    assert "proven" in prove_layers(model, batch(), "float32")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    own = projection.project_gradient
    monkeypatch.setattr(projection, "project_gradient", lambda *given: own(*given) * 1.01)
    with pytest.raises(ProofError, match=r"most in .*lora_A"):
        prove_layers(model, batch(), "float32")


def test_a_base_that_enlarges_rounding_is_not_taken_for_wrong_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wild random weights in bfloat16: the gradients of transformers' own layers are rounding. Wrong ones are still found."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 24})
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for p in base.model.layers.parameters():
        p.data.mul_(20 if p.dim() > 1 else 1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    attach_token_nll(model)
    assert "this base enlarges it" in prove_layers(model, batch(), "bfloat16")
    own = projection.project_gradient
    monkeypatch.setattr(projection, "project_gradient", lambda *given: own(*given) * 9)
    with pytest.raises(ProofError):
        prove_layers(model, batch(), "bfloat16")


def test_the_proof_says_which_layers_compute() -> None:
    base = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320)
    )
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
    attach_token_nll(model)
    assert "transformers' own" in prove_layers(model, batch(), "float32")


def test_repeats_are_a_matter_of_speed() -> None:
    """Dropout included, which is drawn for each place."""
    model = make_described("falcon", torch.float32, ["query_key_value"], lora_dropout=0.3)
    attach_token_nll(model)
    whole = batch()
    without = {name: tensor for name, tensor in whole.items() if name not in ("first", "which")}
    assert len(whole["first"]) < whole["input_ids"].numel()
    results = []
    for each in (whole, without):
        torch.manual_seed(6)
        results.append(gradients(model, token_nll(model, each).sum()))
    assert apart(*results) < 1e-4


@pytest.mark.parametrize("name", ["falcon", "qwen2"])
def test_with_the_kernels_of_a_gpu_they_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention's; in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    # bitsandbytes 0.50.2 on a CPU makes wrong numbers of rows that are not of whole blocks of 64.
    monkeypatch.setitem(SMALL, "intermediate_size", 128)
    model = make_described(name, torch.float32, kind="nf4", r=16)
    expected = gradients(model, fast_loss(model, "none"))
    product, widened = projection.Group._product, []
    monkeypatch.setattr(elementwise, "place_of", lambda x: "triton")
    monkeypatch.setattr(
        projection.Group,
        "_product",
        lambda own, x, plus=None: widened.append(x.shape[1] > own._shape[1]) or product(own, x, plus),
    )
    assert apart(gradients(model, fast_loss(model, "none")), expected) < 1e-4
    assert set(widened) == {True, False}  # updates are made within the frozen products, and apart


def test_gradient_of_a_dropout_draw() -> None:
    """The backward pass uses the mask of the forward pass: a step against the gradient lowers the same draw's loss."""
    model = make_described("falcon", torch.float32, ["query_key_value"], lora_dropout=0.5)
    torch.manual_seed(5)
    loss = fast_loss(model, "none")
    found = gradients(model, loss)
    norm = torch.cat([g.flatten() for g in found.values()]).norm().item()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter -= 1e-3 / norm * found[name]
    torch.manual_seed(5)
    assert (loss - fast_loss(model, "none")).item() == pytest.approx(1e-3 * norm, rel=0.1)


def test_padding_reaches_nothing() -> None:
    model = make_described("falcon", torch.float32, ["query_key_value"])
    attach_token_nll(model)
    rows = {name: tensor for name, tensor in batch().items() if name not in ("first", "which")}
    other = {**rows, "input_ids": rows["input_ids"].masked_fill(rows["attention_mask"] == 0, 7)}
    with torch.no_grad():
        assert torch.equal(token_nll(model, rows), token_nll(model, other))


@pytest.mark.parametrize("kind", ["nf4", "16 bit"])
def test_without_its_adapter_it_is_the_base(kind: str) -> None:
    model = make_described("falcon", torch.float32, kind=kind).eval()
    with torch.no_grad(), model.disable_adapter():
        assert fast_loss(model, "none").item() == pytest.approx(library_loss(model).item(), rel=1e-5)


def test_hooked_layers_are_left_to_the_library_and_no_others() -> None:
    model, seen = make_described("falcon", torch.float32, ["query_key_value"]), []
    attach_token_nll(model)
    layer = causal_lm_of(model).transformer.h[1].mlp
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    with_hook = token_nll(model, batch())
    handle.remove()
    layer.forward = None  # must not be called
    assert len(seen) == 1
    torch.testing.assert_close(token_nll(model, batch()), with_hook, rtol=1e-4, atol=1e-5)
