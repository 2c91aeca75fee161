"""Each metric equals its reference implementation, or values written by hand from its definition."""

import math
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from kestrel.dialogue import Turn
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import (
    bleu_details,
    bleu_scores,
    bleu_signature,
    convention_gap,
    distinct,
    f1_score,
    is_hit,
    normalize_answer,
    reply_statistics,
    rouge_l,
    rouge_signature,
    scores,
)

# What real replies are made of: repeated words, tokenized and natural punctuation, capitals, articles, entities, no text.
WORDS = st.sampled_from(
    [
        "i",
        "am",
        "a",
        "an",
        "the",
        "The",
        "you",
        "do",
        "n't",
        "don't",
        "don",
        "'",
        "t",
        "not",
        "running",
        "runs",
        "Runs",
        "ran",
        "dogs",
        "dog",
        ".",
        "!",
        "?",
        ",",
        "...",
        "--",
        "&quot;",
        "&amp;",
        "3.5",
        "1,000",
        "café",
        "naïve",
        "你好",
        "_",
        "snake_case",
        "🙂",
        "<skipped>",
        "x",
    ]
)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS.filter(lambda text: text.strip())), min_size=1, max_size=12)


def replies(pairs, **fields):
    return [
        Reply(
            dialogue_id=str(i // 2), turn=2 * (i % 2) + 1, reference=reference, response=response, line=i + 1, **fields
        )
        for i, (response, reference) in enumerate(pairs)
    ]


def totals(columns):
    return {name: column.sum(keepdims=True) for name, column in columns.items()}


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("i am happy", "i am happy", 1.0),
        ("I am HAPPY", "i am happy", 1.0),  # case is no matter
        ("the cat", "a cat", 1.0),  # articles are dropped
        ("A dog, a plan.", "dog plan", 1.0),
        ("i'm fine!", "i m fine", 1.0),  # a punctuation mark becomes a space, not nothing
        ("don't", "dont", 0.0),
        ("snake_case", "snake case", 1.0),
        ("$5 (or 6)", "5 or 6", 1.0),
        ("“hi”", "hi", 0.0),  # only ASCII punctuation is removed
        ("café", "cafe", 0.0),
        ("hello there", "hello you there friend", 2 / 3),  # precision 1, recall 1/2
        ("go go go", "go", 0.5),  # a multiset: precision 1/3, recall 1
        ("go go go", "go go", 0.8),  # precision 2/3, recall 1
        ("i like dogs and cats", "i like cats", 0.75),  # precision 3/5, recall 1
        ("cats like i", "i like cats", 1.0),  # order is no matter
        ("theory anathema", "theory", 2 / 3),  # an article is a whole word
        ("yes", "no", 0.0),
        ("", "hello", 0.0),
        ("the", "a", 0.0),  # nothing left on either side
        ("...", "hello .", 0.0),
    ],
)
def test_f1_is_parlais(response, reference, expected):
    assert f1_score(response, reference) == pytest.approx(expected, abs=1e-15)


def test_normalize_answer_treats_all_ascii_punctuation_alike():
    marks = "".join(chr(code) for code in range(33, 127) if not chr(code).isalnum())
    assert len(marks) == 32
    assert normalize_answer(marks.join("xy")) == "x y"
    assert normalize_answer("  An\tApple a day,\n THE end ") == "apple day end"


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_bleu_is_sacrebleus(pairs):
    columns = reply_statistics(replies(pairs), "raw", stemmer=False)
    for name, lowercase in (("bleu", False), ("bleu_lc", True)):
        metric = sacrebleu.BLEU(lowercase=lowercase, force=True)
        expected = metric.corpus_score([h for h, _ in pairs], [[r for _, r in pairs]])
        details = bleu_details(columns, name)
        assert details["score"] == expected.score
        assert details["precisions"] == expected.precisions
        assert details["brevity_penalty"] == expected.bp
        assert (details["sys_len"], details["ref_len"]) == (expected.sys_len, expected.ref_len)
        assert bleu_scores(totals(columns), name)[0] == pytest.approx(expected.score, abs=1e-9)
        assert bleu_signature(lowercase) == str(metric.get_signature())


def test_bleu_of_the_sacrebleu_command(tmp_path):
    pairs = [
        ("I love my two dogs .", "i love my two dogs ."),
        ("do you like to read books ?", "what do you like to read ?"),
        ("", "i am a teacher , and you ?"),
        ("&quot; yes &quot; , it's 3.5 miles", '" yes " , it is 3.5 miles away'),
        ("that is great ! i work at a bank .", "that is great . i work in a bank downtown ."),
    ]
    (tmp_path / "reference.txt").write_text("".join(f"{r}\n" for _, r in pairs), encoding="utf-8")
    (tmp_path / "system.txt").write_text("".join(f"{h}\n" for h, _ in pairs), encoding="utf-8")
    columns = reply_statistics(replies(pairs), "raw", stemmer=False)
    for name, options in (("bleu", []), ("bleu_lc", ["-lc"])):
        command = [
            sys.executable,
            "-m",
            "sacrebleu",
            "reference.txt",
            "-i",
            "system.txt",
            "-m",
            "bleu",
            "-b",
            "-w",
            "10",
        ]
        printed = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert printed.strip() == f"{bleu_details(columns, name)['score']:.10f}"
    assert bleu_details(columns, "bleu")["score"] < bleu_details(columns, "bleu_lc")["score"] < 100


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_rouge_l_is_rouge_scores(pairs):
    for stemmer in (False, True):
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
        expected = [scorer.score(reference, response)["rougeL"].fmeasure for response, reference in pairs]
        assert [rouge_l(response, reference, stemmer) for response, reference in pairs] == expected
        columns = reply_statistics(replies(pairs), "raw", stemmer)
        assert scores(totals(columns))["rouge_l"][0] == pytest.approx(100 * sum(expected) / len(pairs), abs=1e-9)


def test_stemmer_choice_changes_headline_and_signature():
    pairs = [("she runs with dogs", "she was running with a dog")]
    plain, stemmed = (scores(totals(reply_statistics(replies(pairs), "raw", stemmer))) for stemmer in (False, True))
    assert plain["rouge_l"][0] < stemmed["rouge_l"][0]
    assert plain["rouge_l"][0] == stemmed["rouge_l_other"][0]
    assert "stemmer:no" in rouge_signature(False) and "stemmer:yes" in rouge_signature(True)


def test_normalization_is_applied_to_both_sides():
    pairs = [
        ("I really like the two dogs!", "i really like two dogs ."),
        ("Yes, a lot of fun.", "yes , a lot of fun ."),
    ]
    by_name = {
        name: scores(totals(reply_statistics(replies(pairs), name, False)))["bleu"][0]
        for name in ("raw", "lower", "parlai")
    }
    assert by_name["raw"] < by_name["lower"] < by_name["parlai"] == pytest.approx(100)
    mirrored = [(reference, response) for response, reference in pairs]
    assert scores(totals(reply_statistics(replies(mirrored), "parlai", False)))["bleu"][0] == pytest.approx(100)


def test_perplexity_in_three_units():
    rows = replies([("x", "i am café"), ("y", "ok")])
    values = [(6.0, 4), (2.0, 2)]
    rows = [
        Reply(r.dialogue_id, r.turn, r.reference, r.response, r.line, reference_nll=nll, reference_tokens=tokens)
        for r, (nll, tokens) in zip(rows, values, strict=True)
    ]
    result = scores(totals(reply_statistics(rows, "raw", False)))
    assert result["perplexity.token"][0] == pytest.approx(math.exp(8 / 6))
    assert result["perplexity.word"][0] == pytest.approx(math.exp(8 / 4))
    assert result["perplexity.bits_per_byte"][0] == pytest.approx(8 / math.log(2) / (10 + 2))


def test_hits_at_1_is_per_token_and_counts_ties_against():
    def reply(nll, tokens, candidates):
        return Reply("d", 1, "r", "h", 1, reference_nll=nll, reference_tokens=tokens, candidate_nll=candidates)

    assert is_hit(reply(10.0, 10, ((3.0, 2), (9.0, 6))))  # the largest sum, the best per token
    assert not is_hit(reply(10.0, 10, ((3.0, 2), (0.9, 1))))
    assert not is_hit(reply(10.0, 10, ((2.0, 2), (9.0, 6))))  # a tie
    assert not is_hit(reply(10.0, 10, ()))
    rows = [reply(1.0, 1, ((2.0, 1),)), reply(3.0, 1, ((2.0, 1),)), reply(1.0, 1, ())]
    assert scores(totals(reply_statistics(rows, "raw", False)))["hits_at_1"][0] == 0.5  # of the two that are ranked


@given(st.lists(st.tuples(st.floats(0.1, 50), st.integers(1, 9)), min_size=2, max_size=6), st.randoms())
def test_order_of_candidates_does_not_matter(pairs, random):
    (nll, tokens), *candidates = pairs
    first = Reply("d", 1, "r", "h", 1, reference_nll=nll, reference_tokens=tokens, candidate_nll=tuple(candidates))
    random.shuffle(candidates)
    other = Reply("d", 1, "r", "h", 1, reference_nll=nll, reference_tokens=tokens, candidate_nll=tuple(candidates))
    assert is_hit(first) == is_hit(other)


def test_distinct_by_hand():
    assert distinct(["i am i am", "I am"], 1) == 2 / 6
    assert distinct(["i am i am", "I am"], 2) == 2 / 4  # "i am" three times, "am i" once
    assert distinct(["", "x"], 2) == 0.0


def test_shares_of_replies():
    persona, history = ("i like dogs.",), (Turn("partner", "how are you ?"), Turn("self", "fine"))
    responses = [
        "I like the dogs",
        "How are you?",
        "  ",
        "sure . user: and you ?",
        "ok",
        "<|assistant|> hi",
        "note : yes",
    ]
    rows = replies([(r, "ok") for r in responses], persona=persona, history=history, stopped_by="eos")
    result = scores(totals(reply_statistics(rows, "raw", False)))
    assert result["copied_persona"][0] == pytest.approx(1 / 7)
    assert result["copied_history"][0] == pytest.approx(1 / 7)
    assert result["empty"][0] == pytest.approx(1 / 7)
    assert result["speaker_tag"][0] == pytest.approx(2 / 7)
    assert result["stopped_by_eos"][0] == 1.0
    bare = reply_statistics(replies([("x", "y")]), "raw", False)
    assert not {"copied_persona", "copied_history", "stopped_by_eos", "nll", "hits"} & set(bare)


def test_length_ratio_is_sacrebleus():
    pairs = [("i am here .", "i am"), ("no", "yes , sure")]
    expected = sacrebleu.corpus_bleu([h for h, _ in pairs], [[r for _, r in pairs]])
    result = scores(totals(reply_statistics(replies(pairs), "raw", False)))
    assert result["length_ratio"][0] == expected.sys_len / expected.ref_len


def test_scores_of_many_corpora_at_once_are_those_of_each():
    columns = reply_statistics(
        replies([("a b c d e", "a b c d f"), ("x", "y"), ("", "z"), ("q r", "q r")]), "raw", False
    )
    weights = np.array([[1, 1, 1, 1], [0, 2, 0, 0], [0, 0, 3, 0], [2, 0, 1, 5]], dtype=float)
    together = scores({name: weights @ column for name, column in columns.items()})
    for i, row in enumerate(weights):
        alone = scores({name: row[None] @ column for name, column in columns.items()})
        for name, values in alone.items():
            assert np.array_equal(values[0], together[name][i], equal_nan=True), name


def test_convention_gap_sees_casing_and_spacing():
    tokenized, natural = "hello , i do n't know . you ?", "Hello, I don't know. You?"
    assert set(convention_gap(replies([(natural, tokenized)] * 4))) == {"casing", "spacing"}
    assert set(convention_gap(replies([("Hello , you .", "hello , you .")] * 4))) == {"casing"}
    assert convention_gap(replies([(tokenized, tokenized)] * 4)) == {}
    assert convention_gap(replies([("", "ok"), ("yes", "no")])) == {}
