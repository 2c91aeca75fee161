"""The estimate of `generate.py --dry-run` against what real answers allocate; test_dry_run.py has what it prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from datasets import concatenate_datasets, load_from_disk
from make_models import VOCABULARY, make_config, make_tokenizer, settings_of

from kestrel.config.settings import Generation, Lora, Quantization
from kestrel.data.dataset import lengths_of
from kestrel.generation import answers
from kestrel.generation.other_personas import personas_of_others
from kestrel.generation.respond import budget_of
from kestrel.model import budget, dense_weights
from kestrel.model.loss import attach_token_nll, token_nll
from kestrel.planning import answering
from kestrel.planning.memory import Allocations, Estimator, tensors_of
from kestrel.planning.random_base import random_model
from kestrel.prompt.prompt import Prompt

MEMORY = 3 * 2**24  # bytes, of which the answers of these models take a good part


def config_of(architecture: str) -> Any:
    """Of a tiny model; gemma2 bounds its logits and its attention scores."""
    if architecture != "gemma2":
        return make_config(architecture)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    return transformers.Gemma2Config(vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, **shape)


@pytest.mark.parametrize(
    ("architecture", "chosen", "heaviest"),
    [
        ("falcon", {"tokens_per_step": 500}, "batches of answers"),
        ("falcon", {"max_new_tokens": 1, "tokens_per_step": 4000}, "passes"),
        ("llama", {"candidates": True, "other_personas": 1, "max_new_tokens": 2}, "batches of candidates"),
        ("llama", {"tokens_per_step": 300, "do_sample": True, "repetition_penalty": 1.1}, "batches of answers"),
        ("gemma2", {}, "batches of answers"),
    ],
)
def test_the_estimate_is_what_real_answers_allocate(architecture, chosen, heaviest, prepared, monkeypatch):
    rows = concatenate_datasets([load_from_disk(str(prepared.run / "dataset" / "train"))] * 4)
    prompt, generation = Prompt(make_tokenizer(), "plain", 160), Generation(**{"max_new_tokens": 8, **chosen})
    lora, quantization = Lora(r=4, target_modules="all-linear"), Quantization(compute_dtype="float32")
    settings = settings_of(lora=lora, generation=generation, quantization=quantization)
    config = config_of(architecture)
    estimator = Estimator(settings, config)
    found = answering.estimate(settings, config, prompt, rows, estimator, MEMORY)
    counted = counted_peak(settings, config, prompt, rows, estimator, monkeypatch)
    assert found.peak == pytest.approx(counted, rel=0.1)
    assert found.heaviest.startswith(heaviest) and found.peak > 1.5 * (found.base + found.adapter + found.dense)
    assert found.replies == sum(map(len, rows["reply_spans"]))


def counted_peak(settings, config, prompt, rows, estimator, monkeypatch) -> int:
    """Of `write_answers`, with random weights."""
    model, chosen = random_model(settings, config, torch.device("cpu")).eval(), settings.generation
    attach_token_nll(model)
    counter, held = Allocations(tensors_of(model, ())), estimator.base + estimator.adapter
    left = lambda device: int((MEMORY - held - counter.live) * budget.OF_A_CPU)
    for module in (budget, dense_weights):
        monkeypatch.setattr(module, "free_memory", left)
    others = personas_of_others(rows, chosen.other_personas, 0) if chosen.other_personas else []
    with counter, torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long)
        token_nll(model, {"input_ids": ids, "labels": ids, "predicting": ids[0, :1]})  # as after loading
        with dense_weights.dense_weights(model) as is_dense:
            assert is_dense
            made, done, lengths = budget_of(model, chosen), 0, lengths_of(rows)
            while done < len(rows):
                end = done + answers.dialogues_of_shard(lengths[done:], made.tokens)
                asked = answers.questions_of([rows[i] for i in range(done, end)], prompt)
                answers.answer(model, prompt, asked, chosen, 0, others[done:end], made)
                done = end
    return held + counter.peak
