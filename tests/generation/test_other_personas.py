"""References scored under personas of other dialogues: the right likelihoods, and what generate.py and evaluate.py say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import Dataset
from make_models import make_tokenizer, words
from scripts import read_metrics, rows_in, script

from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.generation.answers import questions_of
from kestrel.generation.other_personas import nll_under_others, personas_of_others
from kestrel.model.likelihood import SpanRequest, span_nll
from kestrel.prompt.prompt import Prompt

PERSONAS = [
    (f"i have a {animal} .", f"my favorite food is {food} .", f"i live in {town} .")
    for animal, food, town in (("dog", "soup", "rome"), ("cat", "rice", "lima"), ("horse", "cake", "oslo"))
]
OTHERS = [[PERSONAS[1], PERSONAS[2]], [PERSONAS[0], ("i have a turtle .", *PERSONAS[2])]]


@pytest.mark.parametrize(("format", "max_length"), [("plain", 400), ("plain", 130), ("original", 400)])
def test_likelihoods_are_those_of_the_prompt_with_another_persona(models, format, max_length):
    """Also where truncation cut the first replies, and where a format supervises one reply a sequence."""
    prompt = Prompt(make_tokenizer(), format, max_length)
    dialogues = [Dialogue(f"d{i}", persona, tuple(Turn(**turn) for turn in words(list(persona)) * 2))
                 for i, persona in enumerate(PERSONAS[:2])]  # fmt: skip
    rows = [
        {"dialogue_id": d.dialogue_id, "persona": d.persona, "partner_persona": (), "candidates": (), "turns": [t._asdict() for t in d.turns],
         "input_ids": prompt.render(d).input_ids} for d in dialogues
    ]  # fmt: skip
    by_dialogue = questions_of(rows, prompt)
    found = nll_under_others(models["falcon"], prompt, by_dialogue, OTHERS, 512)
    questions = [(q, others) for asked, others in zip(by_dialogue, OTHERS, strict=True) for q in asked]
    assert len(found) == len(questions) and any(found)
    for (question, others), values in zip(questions, found, strict=True):
        for persona, value in zip(others, values, strict=False):
            context = prompt.context(replace(question.dialogue, persona=persona), question.turn)
            whole = [*context, *question.reference]
            (((expected, _),),) = span_nll(models["falcon"], [SpanRequest(whole, [(len(context), len(whole))])], 512)
            if max_length == 400:
                assert value == pytest.approx(expected, rel=1e-4)
        assert len(values) == 2 or (max_length == 130 and not values), "a longer persona cuts other turns"


def test_other_personas_are_drawn_by_dialogue_and_never_its_own():
    rows = [{"dialogue_id": f"d{i}", "persona": list(PERSONAS[i % 3])} for i in range(9)]
    rows[3]["persona"].reverse()
    dataset = Dataset.from_list(rows)
    drawn = personas_of_others(dataset, 2, seed=0)
    assert drawn == personas_of_others(dataset, 2, seed=0) != personas_of_others(dataset, 2, seed=1)
    for row, others in zip(rows, drawn, strict=True):
        assert len({tuple(sorted(persona)) for persona in [*others, row["persona"]]}) == 3
    with pytest.raises(KestrelError, match="is 3, but dialogue d0 can be given only 2 personas"):
        personas_of_others(dataset, 3, seed=0)


def test_generate_and_evaluate_with_other_personas(trained, tmp_path, capsys):
    arguments = trained.copy_to(tmp_path / "run")
    files = [tmp_path / "run" / "generations" / f"test.{system}.jsonl" for system in ("adapter", "base")]
    assert script("generate").main(arguments) == 0
    before = [rows_in(path) for path in files]
    assert script("generate").main([*arguments, "--generation.other_personas", "2"]) == 0
    for path, rows in zip(files, before, strict=True):
        swapped = rows_in(path)
        assert all(len(row.pop("other_persona_nll")) == 2 for row in swapped)
        assert swapped == rows
    assert script("evaluate").main([*arguments, "--evaluation.resamples", "100"]) == 0
    assert "gain" in capsys.readouterr().out
    systems = read_metrics(tmp_path / "config.yaml")["systems"]
    for name in ("adapter", "base"):
        assert 0 <= systems[name]["swap_accuracy"] <= 1 and systems[name]["swap_accuracy_others"] == 2
        assert systems[name]["ci95"]["persona_gain"] is None, "no interval below six dialogues"
    assert script("generate").main([*arguments, "--generation.other_personas", "999"]) == 1
    assert "generation.other_personas is 999, but dialogue" in capsys.readouterr().err
