"""Each metric equals its reference implementation, or values written by hand from its definition."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from kestrel.dialogue import Turn
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metric_table import BY_NAME, METRICS
from kestrel.evaluation.metrics import (
    Answers,
    Choices,
    References,
    bleu,
    bleu_details,
    bleu_signature,
    distinct,
    f1_score,
    rank,
    rouge_l,
    rouge_signature,
)
from kestrel.evaluation.resampling import Dialogues
from kestrel.evaluation.systems import System, score
from kestrel.evaluation.units import ENGLISH, normalize_answer
from kestrel.evaluation.writing import CONVENTIONS, writing_gap

# What real replies are made of: repeated words, tokenized and natural punctuation, capitals, articles, entities, no text.
VOCABULARY = """
i am a an the The you do n't don't don ' t not running runs Runs ran dogs dog . ! ? , ... -- &quot; &amp; 3.5 1,000 café
naïve 你好 _ snake_case 🙂 <skipped> x
"""
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS.filter(lambda text: text.strip())), min_size=1, max_size=12)


def replies(pairs, **fields):
    return [
        Reply(str(i // 2), 2 * (i % 2) + 1, reference, response, i + 1, **fields)
        for i, (response, reference) in enumerate(pairs)
    ]


def scored(rows, normalization="raw", stemmer=False, units=ENGLISH):
    sizes = {len(row.references) for row in rows}
    choices = Choices(units, normalization, stemmer, sizes.pop() if len(sizes) == 1 else -1)
    system = System("system", "", rows)
    score({"s": system}, Dialogues([row.dialogue_id for row in rows], 100, 0), choices)
    return system


def scores(rows, normalization="raw", stemmer=False, units=ENGLISH):
    return scored(rows, normalization, stemmer, units).point


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
@example([("", "<skipped>")])
@settings(max_examples=60, deadline=None)
def test_bleu_is_sacrebleus(pairs):
    system = scored(replies(pairs))
    for name, lowercase in (("bleu", False), ("bleu_lc", True)):
        metric = sacrebleu.BLEU(lowercase=lowercase, force=True)
        expected = metric.corpus_score([h for h, _ in pairs], [[r for _, r in pairs]])
        assert system.point[name] == expected.score
        details = bleu_details(system.replies, system.totals[name])
        assert list(details.values()) == [expected.precisions, expected.bp, expected.sys_len, expected.ref_len]
        assert bleu_signature(Choices(), lowercase) == str(metric.get_signature())
    if expected.ref_len:  # sacreBLEU drops the word <skipped>
        assert system.point["length_ratio"] == expected.sys_len / expected.ref_len


def several(pairs):
    """Replies with one to three references."""
    texts = [reference for _, reference in pairs]
    more = [tuple(texts[: i % 3]) for i in range(len(pairs))]
    return [replace(reply, other_references=others) for reply, others in zip(replies(pairs), more, strict=True)]


@given(PAIRS.filter(lambda pairs: len(pairs) > 2))
@settings(max_examples=30, deadline=None)
def test_several_references_are_those_of_the_libraries(pairs):
    rows = several(pairs)
    ours, responses = scores(rows), [row.response for row in rows]
    streams = [list(stream) for stream in itertools.zip_longest(*(row.references for row in rows))]
    metric = sacrebleu.BLEU(force=True)
    assert ours["bleu"] == metric.corpus_score(responses, streams).score
    assert bleu_signature(Choices(references=-1)) == str(metric.get_signature())
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    best = [scorer.score_multi(row.references, row.response)["rougeL"].fmeasure for row in rows]
    assert ours["rouge_l"] == pytest.approx(100 * np.mean(best))
    assert ours["f1"] == pytest.approx(
        100 * np.mean([max(f1_score(r.response, t) for t in r.references) for r in rows])
    )
    assert "best of var" in rouge_signature(Choices(references=-1)) and "best of" not in rouge_signature(Choices())


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
    ours = scores(replies(pairs))
    for name, options in (("bleu", []), ("bleu_lc", ["-lc"])):
        options = [*options, "-i", "system.txt", "-m", "bleu", "-b", "-w", "10"]
        command = [sys.executable, "-m", "sacrebleu", "reference.txt", *options]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert printed.strip() == f"{ours[name]:.10f}"
    assert ours["bleu"] < ours["bleu_lc"] < 100


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_rouge_l_is_rouge_scores(pairs):
    for stemmer in (False, True):
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
        expected = [scorer.score(reference, response)["rougeL"].fmeasure for response, reference in pairs]
        assert [rouge_l(response, reference, stemmer) for response, reference in pairs] == expected
        ours = scores(replies(pairs), stemmer=stemmer)["rouge_l"]
        assert ours == pytest.approx(100 * sum(expected) / len(pairs), abs=1e-9)
        assert ours == scores(replies(pairs), stemmer=not stemmer)["rouge_l_other"]
        assert f"stemmer:{'yes' if stemmer else 'no'}" in rouge_signature(Choices(stemmer=stemmer))


def test_normalization_is_applied_to_both_sides():
    pairs = [
        ("I really like the two dogs!", "i really like two dogs ."),
        ("Yes, a lot of fun.", "yes , a lot of fun ."),
    ]
    raw, lower, parlai = (scores(replies(pairs), name)["bleu"] for name in ("raw", "lower", "parlai"))
    assert raw < lower < parlai == pytest.approx(100)
    mirrored = [(reference, response) for response, reference in pairs]
    assert scores(replies(mirrored), "parlai")["bleu"] == pytest.approx(100)


def test_perplexity_in_three_units():
    first, second = replies([("x", "i am café"), ("y", "ok")])
    rows = [replace(first, reference_nll=6.0, reference_tokens=4)]
    ours = scores([*rows, replace(second, reference_nll=2.0, reference_tokens=2)])
    assert ours["perplexity.token"] == pytest.approx(math.exp(8 / 6))
    assert ours["perplexity.word"] == pytest.approx(math.exp(8 / 4))
    assert ours["perplexity.bits_per_byte"] == pytest.approx(8 / math.log(2) / (10 + 2))


def ranked(nll, tokens, candidates):
    return Reply("d", 1, "r", "h", 1, reference_nll=nll, reference_tokens=tokens, candidate_nll=candidates)


def test_hits_at_1_is_per_token_and_counts_ties_against():
    for candidates in itertools.permutations(((3.0, 2), (9.0, 6))):
        assert rank(ranked(10.0, 10, candidates)) == 1  # the largest sum, the best per token
        assert rank(ranked(10.0, 10, (*candidates, (0.9, 1)))) == 2
        assert rank(ranked(10.0, 10, (*candidates, (2.0, 2)))) == 2  # a tie
    rows = [ranked(1.0, 1, ((2.0, 1),)), ranked(3.0, 1, ((2.0, 1),)), ranked(1.0, 1, None)]
    assert scores(rows)["hits_at_1"] == 0.5  # of the two that have candidates


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
    pairs = [(response, "ok") for response in responses]
    ours = scores(replies(pairs, persona=persona, history=history, stopped_by="eos"))
    expected = {"copied_persona": 1, "copied_history": 1, "empty": 1, "speaker_tag": 2, "stopped_by_eos": 7}
    assert {name: ours[name] for name in expected} == pytest.approx({name: n / 7 for name, n in expected.items()})


def test_what_the_rows_do_not_have_is_not_scored():
    bare = set(scores(replies([("x", "y")])))
    assert {metric.name for metric in METRICS if metric.statistics and not metric.needs} == bare


@given(PAIRS, st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_every_score_is_within_its_range_and_many_corpora_at_once_score_as_each(pairs, seed):
    fields = {
        "persona": ("i am",), "history": (), "stopped_by": "eos", "response_tokens": 3, "reference_nll": 2.5,
        "reference_tokens": 2, "candidate_nll": ((3.0, 2),), "other_persona_nll": (2.0, 3.0), "nli": (-1,),
    }  # fmt: skip
    weights = np.random.default_rng(seed).integers(0, 4, size=(5, len(pairs)))
    rows = replies(pairs, **fields)
    answers = Answers(rows, References(rows, Choices()))
    for metric in (metric for metric in METRICS if metric.statistics):
        sums = weights @ np.array(metric.statistics(answers), dtype=float)
        together = metric.score(sums)
        alone = [metric.score(row[None])[0] for row in sums]
        assert np.allclose(alone, together, rtol=1e-12, atol=0, equal_nan=True), metric.name
        low, high = metric.range
        assert all(low <= score <= high + 1e-9 for score in together[np.isfinite(together)]), metric.name
    assert set(scores(rows)) == {metric.name for metric in METRICS if metric.statistics}


def test_entries_of_the_table_are_whole():
    """What readers of the table rely on; a new entry that forgets one fails here and not in somebody's report."""
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert (metric.statistics is None) != (metric.overall is None), metric.name
        assert not metric.headline or (metric.signature and metric.better and metric.tested), metric.name
        assert set(metric.needs) <= set(Reply.__dataclass_fields__), metric.name
        low, high = metric.range
        assert low < high and format(1.0, metric.show), metric.name


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_metrics_json_gives_back_what_was_written(name):
    entry = {"ci95": {}}
    metric = BY_NAME[name]
    metric.write(entry, 0.5, [0.25, 0.75], {"signature": "s"} if metric.signature else {})
    assert metric.read(entry) == (0.5, [0.25, 0.75] if metric.statistics else None)
    assert metric.read({"ci95": {}}) == (None, None)
    assert metric.signature_in(entry) == ("s" if metric.signature else metric.legend)


def test_bleu_without_a_match_is_0():
    assert bleu(np.array([[3.0, 3, 0, 0, 0, 0, 3, 2, 1, 0], [0.0, 3, 0, 0, 0, 0, 0, 0, 0, 0]])).tolist() == [0, 0]


def test_writing_gap_sees_casing_and_spacing():
    tokenized, natural = "hello , i do n't know . you ?", "Hello, I don't know. You?"
    capitals, spaces = CONVENTIONS
    for response, reference, gap in (
        (natural, tokenized, {capitals, spaces}), ("Hello , you .", "hello , you .", {capitals}),
        (tokenized, tokenized, set()), ("", "ok", set()), ("yes", "no", set()),
    ):  # fmt: skip
        assert set(writing_gap([response] * 4, [reference] * 4)) == gap
