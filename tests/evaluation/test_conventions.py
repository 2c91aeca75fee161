"""Scores by other definitions: as their libraries define them, and beside ours."""

from __future__ import annotations

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scripts import make_run, read_metrics, script

from kestrel.evaluation.conventions import conventions

PAIRS = [("i like my two dogs a lot", "i like the dogs a lot !"), ("", "hi"), ("yes , sure", "yes , sure")]


def test_sentence_bleu_of_parlai_and_nltk():
    found = conventions(["parlai_bleu4", "nltk_sentence_bleu"], "en")
    method = SmoothingFunction(epsilon=1e-12).method1
    normalized = [("i like my two dogs lot", "i like dogs lot"), ("yes sure", "yes sure")]
    expected = [sentence_bleu([b.split()], a.split(), smoothing_function=method) for a, b in normalized]
    assert found["parlai_bleu4"].score(PAIRS) == pytest.approx(100 * sum(expected) / 3)
    assert "epsilon:1e-12|normalization:parlai" in found["parlai_bleu4"].signature
    assert 0 < found["nltk_sentence_bleu"].score(PAIRS[:1]) < 100


def test_conventions_stand_beside_the_signed_scores(tmp_path, capsys):
    config = make_run(tmp_path)
    options = ["--config", str(config), "--evaluation.resamples", "100"]
    assert script("evaluate").main(options) == 0
    before = read_metrics(config)["systems"]
    names = ["parlai_bleu4", "nltk_corpus_bleu"]
    capsys.readouterr()
    assert script("evaluate").main([*options, "--evaluation.conventions", *names]) == 0
    assert "ParlAI BLEU-4" in capsys.readouterr().out
    for name, entry in read_metrics(config)["systems"].items():
        assert list(entry.pop("conventions")) == names and entry == before[name]
    assert read_metrics(config)["systems"]["gold"]["conventions"]["nltk_corpus_bleu"] == pytest.approx(100)
    assert script("evaluate").main([*options, "--evaluation.conventions", "bleu5"]) == 2
