"""The vectorized bootstrap equals a slow, direct one, and its intervals and p-values mean what they say."""

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from kestrel.evaluation.bootstrap import Bootstrap, resampled_sums
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import answers_of, f1_score
from kestrel.evaluation.scoring import statistics_of


def corpus(seed: int, dialogues: int = 9) -> list[Reply]:
    """Replies of dialogues of unequal length, with likelihoods, made of few words so that n-grams match."""
    generator = np.random.default_rng(seed)
    words = ["i", "am", "you", "do", "like", "dogs", ".", "?", "really", "and"]

    def text() -> str:
        return " ".join(generator.choice(words, size=generator.integers(1, 9)))

    return [
        Reply(
            f"d{d}", 2 * t + 1, reference=text(), response=text(), line=1, stopped_by="eos" if t else "length",
            reference_nll=float(generator.uniform(1, 9)), reference_tokens=int(generator.integers(1, 9)),
        )
        for d in range(dialogues)
        for t in range(generator.integers(1, 6))
    ]  # fmt: skip


def statistics(replies: list[Reply]) -> dict[str, np.ndarray]:
    return statistics_of(answers_of(replies, "raw", stemmer=True))


def ids_of(replies: list[Reply]) -> list[str]:
    return [reply.dialogue_id for reply in replies]


def test_equals_the_direct_computation():
    replies, resamples, seed = corpus(1), 25, 5
    bootstrap = Bootstrap({"s": statistics(replies)}, ids_of(replies), resamples, seed)
    names = sorted(set(ids_of(replies)))
    picks = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=resamples)
    bleu = sacrebleu.BLEU(force=True)
    rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    drawn = [
        [r for name, n in zip(names, pick, strict=True) for _ in range(n) for r in replies if r.dialogue_id == name]
        for pick in picks
    ]
    for metric, score in {
        "bleu": lambda rows: bleu.corpus_score([r.response for r in rows], [[r.reference for r in rows]]).score,
        "rouge_l": lambda rows: 100 * np.mean([rouge.score(r.reference, r.response)["rougeL"].fmeasure for r in rows]),
        "f1": lambda rows: 100 * np.mean([f1_score(r.response, r.reference) for r in rows]),
        "perplexity.token": lambda rows: np.exp(
            sum(r.reference_nll for r in rows) / sum(r.reference_tokens for r in rows)
        ),
        "stopped_by_eos": lambda rows: np.mean([r.stopped_by == "eos" for r in rows]),
    }.items():
        expected = [score(rows) for rows in drawn]
        assert len(set(expected)) > 5
        np.testing.assert_allclose(bootstrap.draws["s"][metric], expected, rtol=1e-9, err_msg=metric)
        assert bootstrap.interval(bootstrap.draws["s"][metric]) == pytest.approx(
            list(np.percentile(expected, [2.5, 97.5])), rel=1e-9
        )


def test_chunks_draw_what_one_draw_would():
    ids = [f"d{i % 7}" for i in range(20)]
    column = np.arange(20.0)[:, None]
    picks = np.random.default_rng(3).multinomial(7, [1 / 7] * 7, size=150)
    by_dialogue = np.array([column[[i for i in range(20) if i % 7 == d]].sum() for d in range(7)])
    np.testing.assert_allclose(resampled_sums({"x": column}, ids, 150, seed=3)["x"][:, 0], picks @ by_dialogue)


def test_dialogues_are_resampled_and_not_replies():
    """Twenty equal replies to a dialogue tell no more than one does: the interval must not shrink."""
    generator = np.random.default_rng(0)
    values = generator.uniform(size=30)

    def width(copies: int) -> float:
        ids = [f"d{i}" for i in range(30) for _ in range(copies)]
        columns = np.stack([np.repeat(values, copies), np.ones(30 * copies)], axis=1)
        sums = resampled_sums({"x": columns}, ids, 400, seed=1)["x"]
        low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
        return high - low

    assert width(20) == pytest.approx(width(1), rel=1e-9)


def test_a_system_does_not_differ_from_itself_and_a_better_one_does():
    replies = corpus(2, dialogues=30)
    same = statistics(replies)
    gold = statistics([reply.with_response(reply.reference) for reply in replies])
    bootstrap = Bootstrap({"s": same, "copy": dict(same), "gold": gold}, ids_of(replies), 200, seed=0)
    for metric in ("bleu", "rouge_l", "f1"):
        nothing = bootstrap.paired("s", "copy", metric)
        assert (nothing["difference"], nothing["ci95"], nothing["p_value"]) == (0, [0, 0], 1)
        better = bootstrap.paired("gold", "s", metric)
        worse = bootstrap.paired("s", "gold", metric)
        assert better["p_value"] == worse["p_value"] == pytest.approx(1 / 201)
        assert better["difference"] == -worse["difference"] > 0
        low, high = better["ci95"]
        assert 0 < low < better["difference"] < high


def test_p_value_and_interval_hold_their_level():
    """Two systems of equal quality: a 5% test may speak in about 5% of the samples, an interval must cover zero else."""
    generator = np.random.default_rng(7)
    ids = [f"d{i}" for i in range(40) for _ in range(3)]
    alarms = misses = 0
    trials = 200
    for trial in range(trials):
        quality = np.repeat(generator.normal(size=(2, 40)), 3, axis=1)  # shared within a dialogue, as it is in truth
        first, second = 0.5 + 0.1 * quality + 0.02 * generator.normal(size=(2, 120))
        systems = {name: {"f1": np.stack([f1, np.ones(120)], axis=1)} for name, f1 in (("a", first), ("b", second))}
        bootstrap = Bootstrap(systems, ids, 200, seed=trial)
        test = bootstrap.paired("a", "b", "f1")
        alarms += test["p_value"] < 0.05
        misses += not test["ci95"][0] <= 0 <= test["ci95"][1]
    assert 0.01 <= alarms / trials <= 0.11
    assert 0.01 <= misses / trials <= 0.12


def test_one_dialogue_gives_scores_and_no_interval():
    replies = [reply for reply in corpus(3) if reply.dialogue_id == "d0"]
    columns = statistics(replies)
    bootstrap = Bootstrap({"a": columns, "b": columns}, ids_of(replies), 100, seed=0)
    assert bootstrap.interval(bootstrap.draws["a"]["bleu"]) is None
    test = bootstrap.paired("a", "b", "bleu")
    assert test["ci95"] is None and test["p_value"] is None


def test_seed_decides_the_draws():
    replies = corpus(4)
    columns = {"s": statistics(replies)}
    draws = [Bootstrap(columns, ids_of(replies), 100, seed).draws["s"]["f1"].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
