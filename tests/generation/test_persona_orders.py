"""Other orders of the persona: the same sentences, the same everywhere, answered and scored like the one as given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from make_models import make_model, make_tokenizer, words
from make_tokenizers import unigram

from kestrel.config.settings import Generation
from kestrel.data.dataset import _row
from kestrel.dialogue import Dialogue, Turn, reordered
from kestrel.errors import KestrelError
from kestrel.evaluation.alignment import align
from kestrel.evaluation.generations import Generations, Reply, read_generations
from kestrel.evaluation.spread import order_verdicts, separate_orders, spread_over_orders
from kestrel.evaluation.systems import System
from kestrel.generation.answers import answer, questions_of
from kestrel.generation.files import name_in_order, order_in_name
from kestrel.model.loss import attach_token_nll
from kestrel.prompt.prompt import Prompt, Unrenderable
from kestrel.runtime.atomic import read_json

PERSONA = ("i have a dog .", "my favorite food is soup .", "i live in rome .")
TURNS = tuple(Turn(turn["speaker"], turn["text"]) for turn in words(list(PERSONA)))
SENTENCES = st.lists(st.sampled_from("abcdefg"), max_size=6)


@given(SENTENCES, st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 50))
def test_an_order_is_a_permutation_and_another_one_where_there_is_one(persona, seed, name, order):
    dialogue = Dialogue(name, tuple(persona), TURNS, candidates=((), ("x",), ()))
    again = reordered(dialogue, seed, order)
    assert sorted(again.persona) == sorted(persona)
    assert (again.persona != dialogue.persona) == (order > 0 and len(set(persona)) > 1)
    assert again.turns == dialogue.turns and again.candidates == dialogue.candidates
    assert again == reordered(dialogue, seed, order)


def test_orders_depend_on_seed_dialogue_and_number():
    def drawn(seed: int, order: int) -> list[tuple[str, ...]]:
        return [reordered(Dialogue(f"d{i}", tuple("abcdef"), TURNS), seed, order).persona for i in range(50)]

    first = drawn(0, 1)
    assert len(set(first)) > 40
    for other in (drawn(0, 2), drawn(1, 1)):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 5


def test_orders_are_the_same_in_every_process_and_version():
    assert ["".join(reordered(Dialogue("d", tuple("abcdef"), ()), 3, k).persona) for k in range(4)] == [
        "abcdef", "fadcbe", "adecbf", "cedbfa",
    ]  # fmt: skip


@given(st.text(min_size=1), st.integers(1, 10**6))
def test_names_of_orders(system, order):
    assert order_in_name(name_in_order(system, order)) == (system, order)
    assert name_in_order(*order_in_name(system)) == system


# -- answers -----------------------------------------------------------------------------------------------------------


def scoring_model() -> Any:
    model = make_model()
    attach_token_nll(model)
    return model


def log_likelihood(model: torch.nn.Module, context: list[int], reply: list[int]) -> float:
    """By one forward pass of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *reply]])).logits[0]
    chosen = torch.log_softmax(logits.double(), -1)[range(len(context) - 1, len(logits) - 1), [*reply]]
    return -chosen.sum().item()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_likelihoods_are_those_under_the_shuffled_persona(order):
    prompt = Prompt(make_tokenizer(), "plain", 256)
    model = scoring_model()
    candidates = (("no .", "i hate rice ."), (), ("a cat .",))
    dialogue = Dialogue("d", PERSONA, TURNS, candidates=candidates)
    settings = Generation(max_new_tokens=2, candidates=True)
    asked = questions_of([_row(dialogue, prompt.render(dialogue))], prompt, 5, order)
    rows = answer(model, prompt, asked, settings, 0)
    shuffled = reordered(dialogue, 5, order)
    for row, (turn, text), others in zip(rows, shuffled.replies(), candidates, strict=True):
        assert row["persona"] == list(shuffled.persona)
        context = prompt.context(shuffled, turn)
        expected = log_likelihood(model, context, prompt.reply_ids(text))
        assert row["reference_nll"] == pytest.approx(expected, rel=1e-4)
        assert [n for _, n in row.get("candidate_nll", [])] == [len(prompt.reply_ids(other)) for other in others]
        for other, (nll, _) in zip(others, row.get("candidate_nll", []), strict=True):
            assert nll == pytest.approx(log_likelihood(model, context, prompt.reply_ids(other)), rel=1e-4)


def test_replies_that_a_longer_persona_cuts_are_answered_or_left_out():
    # The persona it was trained on takes fewer tokens than any other order.
    tokenizer = make_tokenizer(lines=["Persona: " + " ".join(PERSONA)])
    long, short = Dialogue("long", PERSONA, TURNS), Dialogue("short", PERSONA, TURNS[:2])
    for dialogue, kept in ((long, 3), (short, 0)):
        length = len(Prompt(tokenizer, "plain", 10_000).render(dialogue).input_ids)
        prompt = Prompt(tokenizer, "plain", length)  # it fits as given, to the token
        shuffled = reordered(dialogue, 0, 1)
        rows = [_row(dialogue, prompt.render(dialogue))]
        assert all(question.span for question in questions_of(rows, prompt)[0])
        (questions,) = questions_of(rows, prompt, 0, 1)
        assert [question.span is None for question in questions] == [True, False, False][:kept]
        for question in questions:
            again = prompt.context(shuffled, question.turn) if question.span is None else None
            assert question.context == (again or prompt.render(shuffled).input_ids[: question.span[0]])
        if not kept:
            with pytest.raises(Unrenderable):
                prompt.render(shuffled)
        else:
            model = scoring_model()
            answers = answer(model, prompt, [[], questions], Generation(max_new_tokens=1), 0)
            for row, question in zip(answers, questions, strict=True):
                expected = log_likelihood(model, question.context, question.reference)
                assert row["reference_nll"] == pytest.approx(expected, rel=1e-4)


def test_candidates_that_spell_a_control_token_leave_their_reply_without_a_rank():
    tokenizer = unigram()
    prompt = Prompt(tokenizer, "plain", 256)
    with pytest.raises(Unrenderable):
        prompt.reply_ids("the end </s>")
    candidates = (("i like cars", "the end </s>"), ("i like dogs", "great"), ())
    dialogue = Dialogue("d", PERSONA, TURNS, candidates=candidates)
    row = _row(dialogue, prompt.render(dialogue))
    settings = Generation(max_new_tokens=1, candidates=True)
    rows = answer(scoring_model(), prompt, questions_of([row], prompt), settings, 0)
    assert [len(row.get("candidate_nll", [])) for row in rows] == [0, 2, 0]
    assert "candidate_nll" not in rows[0]


# -- generate.py -------------------------------------------------------------------------------------------------------


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_order_has_a_file_and_the_given_one_does_not_change(trained, tmp_path, capsys):
    import generate

    arguments = [*trained.copy_to(tmp_path / "run"), "--generation.candidates", "true"]
    made = tmp_path / "run" / "generations"
    assert generate.main(arguments) == 0
    alone = (made / "test.adapter.jsonl").read_bytes()
    capsys.readouterr()
    assert generate.main([*arguments, "--generation.persona_orders", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is up to date") == 2 and printed.count("wrote ") == 4 and printed.count("base:") == 1
    assert (made / "test.adapter.jsonl").read_bytes() == alone
    given_rows = rows_in(made / "test.adapter.jsonl")
    for order in (1, 2):
        rows = rows_in(made / f"test.adapter-order{order}.jsonl")
        for row, as_given in zip(rows, given_rows, strict=True):
            dialogue = Dialogue(row["dialogue_id"], tuple(as_given["persona"]), ())
            assert row["persona"] == list(reordered(dialogue, 0, order).persona)
            assert all(row[key] == as_given[key] for key in ("dialogue_id", "turn", "history", "reference"))
            assert len(row["candidate_nll"]) == len(as_given["candidate_nll"])
        nll, nll_given = ([row["reference_nll"] for row in r] for r in (rows, given_rows))
        assert nll != nll_given and sum(nll) == pytest.approx(sum(nll_given), rel=0.3)
    recorded = read_json(made / "manifest.json", "")["generations"]
    assert recorded["test.base-order2.jsonl"]["made_from"]["persona_order"] == 2
    assert len(recorded) == 6

    lost = made / "test.base-order1.jsonl"
    expected = lost.read_bytes()
    lost.unlink()
    assert generate.main([*arguments, "--generation.persona_orders", "2"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 1 and lost.read_bytes() == expected


def test_what_a_file_lacks_is_counted(trained, tmp_path):
    from kestrel.data.dataset import load_split
    from kestrel.generation.answers import left_out

    dataset = load_split(trained.run / "dataset", "test", "")
    keys = [(row["dialogue_id"], i) for row in dataset for i, t in enumerate(row["turns"]) if t["speaker"] == "self"]
    rows = [{"dialogue_id": name, "turn": turn, "candidate_nll": [[1.0, 1]]} for name, turn in keys]
    del rows[0]["candidate_nll"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]), encoding="utf-8")
    assert left_out(dataset, tmp_path / "a.jsonl") == (2, 1)


# -- evaluation --------------------------------------------------------------------------------------------------------


def file_of(name: str, personas: list[tuple[str, ...]] | None = None) -> Generations:
    personas = personas or [("a", "b"), ("c", "d")]
    replies = [Reply(f"d{i}", 1, f"reference {i}", "response", i + 1, p) for i, p in enumerate(personas)]
    path = Path(name + ".jsonl")
    return Generations(path.stem.removeprefix("test."), "test", path, name, replies)


def test_group_of_a_file_ignores_seed_and_order(tmp_path):
    path = tmp_path / "test.adapter-seed2-order11.jsonl"
    path.write_text(json.dumps({"reference": "a", "response": "b"}), encoding="utf-8")
    file = read_generations(path)
    assert (file.system, file.group, file.name_without_order, file.order) == (
        "adapter-seed2-order11", "adapter", "adapter-seed2", 11,
    )  # fmt: skip


def test_orders_are_gathered_with_their_own_system():
    names = [
        "a/test.adapter-order10", "a/test.adapter-order2", "a/test.adapter", "a/test.base", "b/test.adapter",
        "b/test.adapter-order1", "b/test.base-order1", "c/test.other-order2", "c/test.other-order1",
    ]  # fmt: skip
    files, _ = align([file_of(name) for name in names])
    assert [file.order for file in files][:3] == [0, 0, 0]
    first, further = separate_orders(files)
    orders = {str(file.path): [str(f.path) for f in further.get(file.system, [])] for file in first}
    assert orders == {
        "a/test.adapter.jsonl": ["a/test.adapter-order2.jsonl", "a/test.adapter-order10.jsonl"],
        "a/test.base.jsonl": ["b/test.base-order1.jsonl"],  # run b has none of its own
        "b/test.adapter.jsonl": ["b/test.adapter-order1.jsonl"],
        "c/test.other-order1.jsonl": ["c/test.other-order2.jsonl"],
    }


def test_another_persona_is_no_order():
    other = file_of("test.adapter-order1", [("b", "a"), ("c", "e")])
    with pytest.raises(KestrelError, match=r"test\.adapter-order1\.jsonl:2: .* test\.adapter\.jsonl:2"):
        separate_orders([file_of("test.adapter"), other])


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def test_spread(scores):
    first = file_of("test.adapter")
    further = [file_of(f"test.adapter-order{k}", [("b", "a"), ("c", "d")]) for k in range(1, len(scores))]
    points = [{"bleu": score, "f1": 0.0} for score in scores]
    spread = spread_over_orders(first, further, points)
    assert spread["orders"] == list(range(len(scores))) and spread["reordered"] == 0.5
    bleu = spread["bleu"]
    assert bleu["values"] == scores and (bleu["min"], bleu["max"]) == (min(scores), max(scores))
    mean = sum(scores) / len(scores)
    assert bleu["mean"] == pytest.approx(mean)
    assert bleu["relative_change"] == pytest.approx((max(scores) - min(scores)) / mean)
    assert spread["f1"]["relative_change"] is None


def test_a_lead_that_hangs_on_the_order_is_said_to():
    def entry(**ranges: tuple[float, float]) -> dict[str, Any]:
        return {key: {"min": low, "max": high} for key, (low, high) in ranges.items()}

    spreads = {
        "adapter": entry(bleu=(5.0, 10.0), rouge_l=(12.0, 13.0), f1=(8.0, 9.0)),
        "base": entry(bleu=(6.0, 7.0), rouge_l=(11.0, 12.0), f1=(7.0, 7.5)),
    }
    systems = {"adapter": System("system", "", [], Path("a")), "base": System("base", "", [], Path("a"))}
    ahead, behind = order_verdicts(spreads, systems)
    assert ahead == "adapter in its worst order is still ahead of base in its best order in F1."
    assert behind == "adapter in its worst order is NOT ahead of base in its best order in BLEU, ROUGE-L."
