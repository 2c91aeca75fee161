"""Intervals and tests equal slow, direct computations, and mean what they say."""

import itertools

import numpy as np
import pytest
import sacrebleu

from kestrel.evaluation import metrics, resampling
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metric_table import BY_NAME
from kestrel.evaluation.metrics import Choices
from kestrel.evaluation.resampling import Dialogues, holm, pseudo_values
from kestrel.evaluation.systems import System, score


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


def of_replies(replies: list[Reply], resamples: int = 200) -> Dialogues:
    return Dialogues([reply.dialogue_id for reply in replies], resamples, seed=5)


def scored(replies: list[Reply], dialogues: Dialogues) -> System:
    system = System("system", "", replies)
    score({"s": system}, dialogues, Choices())
    return system


def test_the_score_without_a_dialogue_is_the_library_s():
    """The jackknife, through sums over dialogues, against sacreBLEU on the replies that are left."""
    replies = corpus(1)
    system = scored(replies, of_replies(replies))
    bleu = sacrebleu.BLEU(force=True)
    names = sorted({reply.dialogue_id for reply in replies})

    def direct(rows: list[Reply]) -> float:
        return bleu.corpus_score([r.response for r in rows], [[r.reference for r in rows]]).score

    left = [direct([r for r in replies if r.dialogue_id != name]) for name in names]
    expected = len(names) * direct(replies) - (len(names) - 1) * np.array(left)
    np.testing.assert_allclose(pseudo_values(system.sums["bleu"], metrics.bleu), expected, rtol=1e-9)
    perplexity = BY_NAME["perplexity.token"]
    nll, tokens = (np.array([getattr(r, f"reference_{key}") for r in replies]) for key in ("nll", "tokens"))
    kept = np.array([r.dialogue_id != names[0] for r in replies])
    alone = np.exp(nll.sum() / tokens.sum()), np.exp(nll[kept].sum() / tokens[kept].sum())
    pseudo = pseudo_values(system.sums[perplexity.name], perplexity.score)
    assert pseudo[0] == pytest.approx(len(names) * alone[0] - (len(names) - 1) * alone[1])


def test_intervals_are_those_of_a_direct_studentized_bootstrap(monkeypatch):
    monkeypatch.setattr(resampling, "_CHUNK", 12 * 70)  # drawn in pieces
    values, count = np.random.default_rng(0).gamma(2.0, size=12), 12
    dialogues = Dialogues([f"d{i}" for i in range(count)], 150, seed=3)
    interval = dialogues.intervals({"x": values}, {"x": 7.0})["x"]
    generator = np.random.default_rng(3)
    samples = [values[generator.integers(0, count, size=count)] for _ in range(150)]
    t = [(sample.mean() - values.mean()) / (sample.std(ddof=1) / count**0.5) for sample in samples]
    error = values.std(ddof=1) / count**0.5
    low, high = np.quantile(t, [0.025, 0.975])
    assert interval == pytest.approx([7 - high * error, 7 - low * error])
    half = np.quantile(np.abs(t), 0.95) * error
    assert dialogues.intervals({"x": values}, {"x": 7.0}, symmetric=True)["x"] == pytest.approx([7 - half, 7 + half])


def test_many_corpora_have_the_score_that_sacrebleu_gives_each():
    """Few n-grams, so that some corpora match in no order, in some, or are too short for four words."""
    generator = np.random.default_rng(0)
    grams = generator.integers(0, 6, size=(2000, 4))
    matches = generator.integers(0, grams + 1)
    sums = np.concatenate([generator.integers(0, 9, size=(2000, 2)), matches, grams], axis=1)
    sums[sums[:, 0] == 0, 2:] = 0  # an empty corpus has no n-grams
    expected = [metrics.bleu(row[None])[0] for row in sums]
    np.testing.assert_allclose(metrics.bleu(sums), expected, rtol=1e-12)
    assert 0 < np.count_nonzero(expected) < 2000


@pytest.mark.parametrize("metric", ["bleu", "f1"])
def test_exact_p_values_count_all_exchanges(metric):
    one, two = corpus(2, dialogues=6), corpus(2, dialogues=6)
    for i, reply in enumerate(two):
        two[i] = reply.with_response(reply.reference if i % 3 else "you like dogs")
    dialogues = of_replies(one)
    first, second = (scored(rows, dialogues).sums[metric] for rows in (one, two))
    compute = BY_NAME[metric].score
    observed = abs(compute(first.sum(0)[None]) - compute(second.sum(0)[None]))[0]
    beyond = []
    for swap in itertools.product([False, True], repeat=6):
        mask = np.array(swap)[:, None]
        a, b = np.where(mask, second, first).sum(0), np.where(mask, first, second).sum(0)
        beyond.append(abs(compute(a[None]) - compute(b[None]))[0] >= observed - 1e-9)
    p_value = dialogues.p_values({"x": (first, second, compute)})["x"]
    assert p_value == pytest.approx(np.mean(beyond)) and p_value < 1


def test_equal_systems_do_not_differ_and_gold_does():
    replies = corpus(2, dialogues=30)
    dialogues = of_replies(replies)
    same = scored(replies, dialogues)
    gold = scored([reply.with_response(reply.reference) for reply in replies], dialogues)
    for metric in ("bleu", "rouge_l", "f1"):
        compute = BY_NAME[metric].score
        pairs = {"same": (same.sums[metric],) * 2, "gold": (gold.sums[metric], same.sums[metric])}
        p_values = dialogues.p_values({name: (*pair, compute) for name, pair in pairs.items()})
        assert p_values["same"] == 1 and p_values["gold"] == 1 / (resampling.EXCHANGES + 1)
    interval = dialogues.intervals(
        {"gold": pseudo_values(gold.sums["bleu"], metrics.bleu)}, gold.point | {"gold": 100.0}
    )
    assert interval["gold"] == pytest.approx([100, 100])


def test_fewer_than_six_dialogues_give_scores_and_nothing_else():
    replies = [reply for reply in corpus(3) if reply.dialogue_id in ("d0", "d1", "d2", "d3", "d4")]
    dialogues = of_replies(replies)
    sums = scored(replies, dialogues).sums["f1"]
    assert dialogues.intervals({"x": pseudo_values(sums, metrics.points)}, {"x": 1.0}) == {"x": None}
    assert dialogues.p_values({"x": (sums, sums + 1, metrics.points)}) == {"x": None}


def test_dialogues_and_not_replies_are_drawn():
    """Twenty equal replies to a dialogue tell no more than one does: the interval must not shrink."""
    values = np.random.default_rng(0).uniform(size=30)

    def interval(copies: int) -> list[float] | None:
        dialogues = Dialogues([f"d{i}" for i in range(30) for _ in range(copies)], 400, seed=1)
        sums = dialogues.sums(np.stack([np.repeat(values, copies), np.ones(30 * copies)], axis=1))
        return dialogues.intervals({"x": pseudo_values(sums, metrics.ratio)}, {"x": values.mean()})["x"]

    assert interval(20) == pytest.approx(interval(1), rel=1e-9)


def test_many_dialogues_are_drawn_in_groups(monkeypatch):
    monkeypatch.setattr(resampling, "_MOST", 50)
    values = np.random.default_rng(0).normal(size=(900, 1))
    dialogues = Dialogues([f"d{i // 3}" for i in range(900)], 400, seed=1)
    sums = dialogues.sums(np.concatenate([values, np.ones((900, 1))], axis=1))
    assert (dialogues.count, dialogues.groups, sums[:, 1].min(), sums[:, 1].max()) == (300, 50, 18, 18)
    low, high = dialogues.intervals({"x": pseudo_values(sums, metrics.ratio)}, {"x": values.mean()})["x"]
    by_dialogue = values.reshape(300, 3).mean(1)
    assert high - low == pytest.approx(2 * 1.96 * by_dialogue.std() / 300**0.5, rel=0.25)


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_seed_decides_the_draws():
    values = {"x": np.random.default_rng(0).normal(size=20)}
    one, again, other = (
        Dialogues(list("abcdefghijklmnopqrst"), 100, s).intervals(values, {"x": 0.0}) for s in (1, 1, 2)
    )
    assert one == again != other
