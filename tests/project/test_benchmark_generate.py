"""benchmarks/generate.py runs, counts its answers, and times no answers that differ from the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from make_models import make_model, make_tokenizer, words, write_base

from benchmarks import ties
from benchmarks.generate import check, main, rows_of
from kestrel.config.settings import Generation
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import ProofError
from kestrel.generation.answers import questions_of
from kestrel.generation.prefix_batch import PrefixBatch
from kestrel.generation.prefix_cache import Prefixes
from kestrel.model.loss import attach_token_nll
from kestrel.prompt.prompt import Prompt

PERSONA = ["i have a cat .", "my favorite food is rice .", "i live in lima ."]
DIALOGUE = Dialogue("d", tuple(PERSONA), tuple(Turn(**turn) for turn in words(PERSONA)))


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    return Prompt(make_tokenizer(), "plain", 256)


@pytest.mark.parametrize("replies", [1, 3, 4, 8])
def test_the_number_of_replies_is_exact(prompt: Prompt, replies: int) -> None:
    rows = rows_of([DIALOGUE], prompt, replies)
    assert sum(len(questions) for questions in questions_of(rows, prompt)) == replies
    assert len({row["dialogue_id"] for row in rows}) == len(rows) == -(-replies // 3)


def test_a_token_from_another_context_is_detected(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    attach_token_nll(model)
    asked = [question for questions in questions_of(rows_of([DIALOGUE], prompt, 3), prompt) for question in questions]
    settings = Generation(max_new_tokens=6, stop_strings=[])
    assert check(model, prompt, asked, settings, "float32")["deviations_below_the_likeliest"] <= 1e-3
    own = Prefixes.copy_rows

    def without_context(*given: Any) -> PrefixBatch:
        rows = own(*given)
        rows._mask[:, : rows.width] = 0
        return rows

    monkeypatch.setattr(Prefixes, "copy_rows", without_context)
    with pytest.raises(ProofError, match="standard deviations below the likeliest"):
        check(model, prompt, asked, settings, "float32")


def test_the_command_writes_its_record(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    options = "--profile cpu --layers 1 --replies 20 --new-tokens 4 --stock-batch 5 --stock-batches 2"
    assert main([*options.split(), "--tokens_per_step", "512", "4096", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (record["replies"], record["new_tokens"]) == (20, 4) and record["commit"] and record["versions"]["torch"]
    ours, other, stock = record["rows"]
    names = ["kestrel, tokens_per_step 512", "kestrel, tokens_per_step 4096", "stock"]
    assert [row["name"] for row in record["rows"]] == names
    for row in record["rows"]:
        assert row["replies_per_second"] == pytest.approx(20 / row["seconds"]) and row["peak_bytes"] > 0
    assert (
        ours["replies"] == other["replies"] == 20 and ours["prefill_seconds"] + ours["decode_seconds"] < ours["seconds"]
    )
    assert stock["timed_replies"] == 10 and stock["seconds"] == pytest.approx(stock["timed"] * 2)


def test_answers_are_transformers_own_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = write_base(tmp_path / "base"), tmp_path / "ties.json"
    options = [
        "--model",
        str(base),
        "--config",
        "configs/quickstart.yaml",
        "--dtype",
        "float32",
        "--output",
        str(output),
    ]
    assert ties.main([*options, "--replies", "9", "--new-tokens", "6"]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (
        record["answers"] == record["equal"] == 9 and record["tokens"] > 9 and "'parted'" not in capsys.readouterr().out
    )
    part = ties.gap_where_they_part(make_model(), [12, 13, 14], [20, 21], [20, 22])
    assert part["place"] == 1 and part["spacings"] != 0
