"""Adapters that PEFT made in its other forms compute here what they compute there, merged too; GPT-2's open anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from make_models import make_model, settings_of, write_base
from peft import LoraConfig, PeftModel, get_peft_model

from kestrel.adapter.lora import add_lora, load_adapter
from kestrel.config.settings import Lora, Quantization
from kestrel.errors import KestrelError
from kestrel.model.base import load_base
from kestrel.publishing.merge import _merged

IDS = torch.arange(20, 36)[None]
FORMS: dict[str, dict[str, Any]] = {
    "regular expression": {"target_modules": r".*\.(q_proj|v_proj)$"},
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "a rank for each layer": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "the embedding of a tied head": {"target_modules": ["q_proj", "embed_tokens"]},
    "a tied head": {"target_modules": ["lm_head"]},
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_peft_computes(form: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen2")
    settings = settings_of(base, quantization=Quantization(bits=16, compute_dtype="float32"))
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **FORMS[form])
    theirs = get_peft_model(load_base(settings)[0], config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_base(settings)[0], tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(theirs))
    merged = _merged(ours, tmp_path / "adapter", settings)
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-4)


def test_an_adapter_with_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    """PEFT saves it where tokens were added, and its own way out is to resize the base first."""
    base = write_base(tmp_path / "base", "qwen2")
    settings = settings_of(base, quantization=Quantization(bits=16, compute_dtype="float32"))
    model = make_model("qwen2")
    model.resize_token_embeddings(400)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    with pytest.raises(KestrelError, match=r"of shape \[400, 64\], .* Merge it with peft"):
        load_adapter(load_base(settings)[0], tmp_path / "adapter")


@pytest.mark.parametrize("bits", [4, 16])
def test_an_adapter_of_gpt2_opens_in_peft_without_a_warning(bits: Any, tmp_path: Path, recwarn) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    settings = settings_of(base, quantization=Quantization(bits=bits, compute_dtype="float32"))
    adapted = add_lora(load_base(settings)[0], Lora(r=4, target_modules="all-linear"), seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert adapted.peft_config["default"].fan_in_fan_out
    stock = PeftModel.from_pretrained(
        make_model("gpt2") if bits == 16 else load_base(settings)[0], tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(stock), logits(adapted))
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    again = load_adapter(load_base(settings)[0], tmp_path / "adapter")
    torch.testing.assert_close(
        logits(_merged(again, tmp_path / "adapter", settings)), logits(adapted), rtol=1e-4, atol=1e-4
    )
