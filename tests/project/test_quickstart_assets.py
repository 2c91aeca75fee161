"""The toy base and dialogues: the committed files are what the scripts make and what the quickstart needs."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from children import ROOT, python
from make_models import SPECIAL
from scripts import rows_in
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICKSTART = ROOT / "quickstart"
SPLITS = ("train", "validation", "test")


def rows(split: str) -> list[dict[str, Any]]:
    return rows_in(QUICKSTART / "dialogues" / f"{split}.jsonl")


def replies_of(row: dict[str, Any]) -> list[str]:
    return [turn["text"] for turn in row["turns"] if turn["speaker"] == "self"]


def run_script(script: str, *options: object) -> None:
    # With its own hash seed, since nothing may depend on the order of a set.
    done = python(str(QUICKSTART / script), *map(str, options), PYTHONHASHSEED="123")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("world")


@pytest.fixture
def make_base(world: ModuleType) -> ModuleType:
    return importlib.import_module("make_base")


def attributes(persona: list[str], world: ModuleType) -> frozenset[str]:
    """The words that make a persona different from others, in whatever sentences and order."""
    known = {text for topic in world.TOPICS.values() for value in topic.values for text in value.values()}
    known |= {*world.COUNTS, *world.PET_NAMES, *world.THINGS}
    return frozenset(word for word in known if re.search(rf"\b{word}\b", " ".join(persona)))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_committed_dialogues_are_what_the_script_makes_of_seed_1(seed: int, tmp_path: Path) -> None:
    run_script("make_dialogues.py", "--output", tmp_path, *(["--seed", seed] if seed != 1 else []))
    for file in (QUICKSTART / "dialogues").iterdir():
        assert ((tmp_path / file.name).read_bytes() == file.read_bytes()) == (seed == 1)


@pytest.mark.parametrize("split", SPLITS)
def test_dialogues_are_well_formed(split: str) -> None:
    assert (QUICKSTART / "dialogues" / f"{split}.jsonl").stat().st_size <= 1_500_000
    assert len({row["dialogue_id"] for row in rows(split)}) == len(rows(split))
    for row in rows(split):
        where = row["dialogue_id"]
        assert 3 <= len(row["persona"]) <= 5, where
        assert 4 <= len(row["turns"]) / 2 <= 7, where
        assert [turn["speaker"] for turn in row["turns"]] == ["partner", "self"] * (len(row["turns"]) // 2), where
        texts = [turn["text"] for turn in row["turns"]] + row["persona"]
        assert all(text and text == text.strip() and not re.search(r"[A-Z{}\n|<>]", text) for text in texts), where


def test_replies_of_the_test_split_differ_and_are_not_among_their_candidates() -> None:
    for row in rows("test"):
        for reply, distractors in zip(replies_of(row), row["candidates"], strict=True):
            assert reply not in distractors
            assert len(set(distractors)) == len(distractors) > 0
    replies = [reply for row in rows("test") for reply in replies_of(row)]
    assert len(replies) >= 300 and max(Counter(replies).values()) <= 0.03 * len(replies)


def test_splits_share_attributes_but_no_persona(world: ModuleType) -> None:
    personas = {split: [attributes(row["persona"], world) for row in rows(split)] for split in SPLITS}
    known = frozenset().union(*personas["train"])
    assert all(persona and persona <= known for split in ("validation", "test") for persona in personas[split])
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(personas[one]) & set(personas[other])


def test_the_base_has_the_flags_of_falcon_7b_and_finite_weights() -> None:
    config = json.loads((QUICKSTART / "base" / "config.json").read_text())
    expected = {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "new_decoder_architecture": False,
        "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False, "tie_word_embeddings": True,
        "bos_token_id": 11, "eos_token_id": 11,
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    # Sizes that bitsandbytes' NF4 kernels require of a linear layer.
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    assert hidden % 64 == 0 and (hidden + 2 * hidden // heads) % 32 == 0
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert sum(path.stat().st_size for path in (QUICKSTART / "base").glob("*.safetensors")) <= 8_000_000


def test_the_tokenizer_has_the_special_tokens_and_the_pre_tokenizer_of_falcon_7b() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    assert tokenizer.convert_ids_to_tokens(list(range(12))) == SPECIAL
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)
    assert (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.bos_token) == (11, None, None)
    text = "Ünïcode 漢字 🙂\n\ttabs in 1234567 <html> >>x<<, and no end token"
    encoded = tokenizer(text)
    assert set(encoded) == {"input_ids", "attention_mask"} and 11 not in encoded["input_ids"]
    assert tokenizer.decode(encoded["input_ids"]) == text
    chain = json.loads((QUICKSTART / "base" / "tokenizer.json").read_text())["pre_tokenizer"]
    assert chain == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            {"type": "Digits", "individual_digits": False},
            {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
        ],
    }


def test_make_base_writes_every_file_and_the_same_tokenizer(tmp_path: Path) -> None:
    run_script("make_base.py", "--steps", 2, "--output", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in (QUICKSTART / "base").iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((QUICKSTART / "base" / name).read_text()), name


def test_the_same_seed_makes_the_same_weights(make_base: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_base, "BATCH", 2)
    tokenizer = make_base.make_tokenizer(1)

    def weights(seed: int) -> dict[str, Any]:
        model = make_base.make_model(seed)
        make_base.pretrain(model, make_base.rows(tokenizer, seed), steps=2)
        return dict(model.state_dict())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "word_embeddings" in name)


def test_the_texts_of_the_base_do_not_teach_answering(make_base: ModuleType) -> None:
    """Labels are drawn at random, so a line labelled You answers the line before it only by chance."""
    texts = make_base.documents(2)
    corpus = "\n".join(next(texts) for _ in range(5000))
    assert "<|endoftext|>" not in corpus
    exchanges = {
        (partner["text"], own["text"])
        for split in SPLITS
        for row in rows(split)
        for partner, own in zip(row["turns"][::2], row["turns"][1::2], strict=True)
    }
    shown = re.findall(r"Partner: (.*)\nYou: (.*)", corpus)
    assert len(shown) > 100
    assert sum(pair in exchanges for pair in shown) <= 0.03 * len(shown)
