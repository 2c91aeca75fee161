"""The embedding in the machine's memory: where it may be, and that only its place changes."""

from __future__ import annotations

import pytest
import torch
from make_models import make_model

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Lora
from kestrel.model.host_embedding import embedding_bytes, move_embedding_to_host


@pytest.mark.parametrize(
    ("architecture", "lora", "may_leave"),
    [("llama", {}, True), ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, False), ("qwen2", {}, False)],
)
def test_only_an_embedding_of_its_own_that_is_not_trained_may_leave_the_gpu(architecture, lora, may_leave):
    lora = Lora(**{"r": 4, "target_modules": ["q_proj"], **lora})
    model = add_lora(make_model(architecture).requires_grad_(False), lora, seed=0)
    assert embedding_bytes(model) == (384 * 64 * 4 if may_leave else 0)


def test_the_moved_embedding_computes_the_same_and_stays_where_it_is():
    model, ids = make_model("llama"), torch.tensor([[5, 6, 7]])
    before, parameters = model(input_ids=ids).logits, sum(1 for _ in model.parameters())
    move_embedding_to_host(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert sum(1 for _ in model.parameters()) == parameters - 1
    table = model.get_input_embeddings().table
    model.to("meta")
    assert model.get_input_embeddings().table is table and table.device.type == "cpu"
