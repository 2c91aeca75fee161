"""Scores of persona, ranking and consistency: by hand, against definitions, and through evaluate.py with an NLI model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizers import wordpiece
from scripts import make_run, read_metrics, script

from kestrel.errors import KestrelError
from kestrel.evaluation.consistency import NliModel
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import Choices, rank
from kestrel.evaluation.persona import rarity_of
from kestrel.evaluation.resampling import Dialogues
from kestrel.evaluation.systems import System, score

PERSONA = ("i have two dogs .", "i love blue cars .")
TRAINING = ["i have i", "i love love"]
WEIGHT = {"i": 1 / (1 + math.log(4)), "have": 1 / (1 + math.log(2)), "love": 1 / (1 + math.log(3))}


def reply(response: str, dialogue: str = "d", turn: int = 1, **more) -> Reply:
    return Reply(dialogue, turn, "x", response, 1, persona=PERSONA, **more)


def scores(*replies: Reply) -> dict[str, float]:
    system = System("system", "", replies)
    score({"s": system}, Dialogues([r.dialogue_id for r in replies], 100, 0), Choices(rarity=rarity_of(TRAINING)))
    return system.point


def test_words_shared_with_the_persona_by_hand():
    found = scores(reply("I have cats!"))
    shared, said = WEIGHT["i"] + WEIGHT["have"], WEIGHT["i"] + WEIGHT["have"] + 1
    known = WEIGHT["i"] + WEIGHT["have"] + WEIGHT["love"] + 4  # two, dogs, blue, cars
    precision, recall = shared / said, shared / known
    assert found["persona_recall"] == pytest.approx(100 * recall)
    assert found["persona_f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert found["persona_coverage"] == pytest.approx(shared / 2)


def test_persona_scores_of_extremes():
    whole = " ".join(PERSONA)
    assert scores(reply(whole))["persona_f1"] == scores(reply(whole))["persona_recall"] == pytest.approx(100)
    for response in ("", "nothing shared here"):
        assert scores(reply(response))["persona_f1"] == scores(reply(response))["persona_coverage"] == 0
    assert "persona_f1" not in scores(replace(reply("x"), persona=None))


@given(st.lists(st.tuples(st.floats(0.1, 50), st.integers(1, 9)), min_size=1, max_size=12), st.floats(0.1, 50))
@settings(deadline=None)
def test_ranks_agree_with_sorting(candidates, nll):
    row = reply("x", reference_nll=nll, reference_tokens=4, candidate_nll=tuple(candidates))
    place = 1 + sum(other / tokens <= nll / 4 for other, tokens in candidates)
    assert rank(row) == place
    found = scores(row)
    assert found["mrr"] == 1 / place and found["hits_at_1"] == (place == 1)
    for k in (3, 5, 10):
        if len(candidates) >= k:
            assert found[f"hits_at_{k}"] == (place <= k)
        else:
            assert math.isnan(found[f"hits_at_{k}"]), "no reply has more than k candidates"


def test_likelihood_under_other_personas_by_hand():
    rows = [
        reply("x", reference_nll=10.0, reference_tokens=5, other_persona_nll=(12.0, 16.0)),
        reply("x", turn=3, reference_nll=8.0, reference_tokens=3, other_persona_nll=(8.0, 9.0)),
        reply("x", turn=5, reference_nll=8.0, reference_tokens=3),
    ]
    found = scores(*rows)
    assert found["persona_gain"] == pytest.approx((4.0 + 0.5) / 8)
    assert found["swap_accuracy"] == 0.5, "a tie is a miss, and a reply without values does not count"


def test_self_repetition_and_questions_by_hand():
    rows = [
        reply("i like my two dogs", turn=3),
        reply("i like dogs", turn=1),
        reply("i like dogs", dialogue="e"),
        reply("哪里？", turn=5),
    ]
    found = scores(*rows)
    assert found["self_repetition"] == 1 / 4  # "i like" of four bigrams; a first response does not count
    assert found["questions"] == 1 / 4


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nli_model(tmp_path_factory.mktemp("nli"), ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"])


def write_nli_model(folder: Path, labels: list[str]) -> Path:
    """A random classifier of pairs, whose labels are in the given order."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = wordpiece()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=1.0, **shape)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pairs_have_the_labels_that_the_model_gives_each_alone(nli, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(nli), AutoTokenizer.from_pretrained(nli)
    texts = ["i have two dogs", "", "no ! i love cars " * 30, "hi ?", "what do you do for a living ?"]
    judged = NliModel(str(nli)).judge([reply(text, turn=turn) for turn, text in enumerate(texts)])
    values = set()
    for row in judged:
        for sentence, value in zip(PERSONA, row.nli, strict=True):
            inputs = tokenizer(row.response, sentence, truncation=True, max_length=64, return_tensors="pt")
            label = model.config.id2label[int(model(**inputs).logits.argmax())]
            expected = {"CONTRADICTION": -1, "NEUTRAL": 0, "ENTAILMENT": 1}[label] if row.response else 0
            assert value == expected
            values.add(value)
    assert len(values) > 1
    found = scores(*judged)
    assert found["consistency"] == pytest.approx(sum(sum(row.nli) for row in judged) / len(judged))
    assert found["contradiction"] == sum(-1 in row.nli for row in judged) / len(judged)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1", "LABEL_2"], ["entailment", "not_entailment"]])
def test_a_model_without_the_three_labels_is_refused(labels, tmp_path):
    with pytest.raises(KestrelError, match=f"has the labels {', '.join(labels)}; expected three"):
        NliModel(str(write_nli_model(tmp_path / "model", labels)))


def test_evaluate_with_an_nli_model(nli, tmp_path, capsys):
    config = make_run(tmp_path)
    options = ["--config", str(config), "--evaluation.resamples", "100"]
    assert script("evaluate").main([*options, "--evaluation.nli", str(nli)]) == 0
    metrics = read_metrics(config)
    assert metrics["signature"].endswith(f"nli:{nli.name}"), "no folder of this machine"
    for entry in metrics["systems"].values():
        assert 0 <= entry["contradiction"] <= 1 and entry["ci95"]["consistency"]
    assert "C.Score" in capsys.readouterr().out
    report = (config.parent / "run" / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "contradicts the persona" in report
    assert script("evaluate").main([*options, "--evaluation.nli", str(tmp_path / "nowhere")]) == 1
    assert "evaluation.nli" in capsys.readouterr().err
