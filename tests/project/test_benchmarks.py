"""The benchmarks run, do not time a wrong loss, and calculate correctly."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_models import make_model, write_corpus

from benchmarks import agreement, peers
from benchmarks.options import command_of
from benchmarks.profiles import LORA, PROFILES, ROOT, System
from benchmarks.rows import row_of, table
from benchmarks.shape_profiles import profile_of
from benchmarks.shapes import SHAPES
from benchmarks.significance import power_at
from kestrel.errors import ProofError

_ROWS: list[dict[str, Any]] = [
    {"input_ids": [20 + 7 * n % 300 for n in range(first, first + 40)], "reply_spans": [(8, 14), (25, 40)]}
    for first in (0, 50, 100)
]


def _with_lora(seed: int) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(make_model(), LoraConfig(**LORA, task_type="CAUSAL_LM"))


def _loss(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    """The library's own loss over a row's labels."""
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    return model(input_ids=ids, labels=labels).loss


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.pt"
    agreement.write_reference(_with_lora(seed=1), _ROWS, path)
    return path


def test_the_same_loss_agrees_whatever_the_adapter(reference: Path) -> None:
    """Each system starts with its own adapter; the check sets the same one for all and restores theirs afterwards."""
    model = _with_lora(seed=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def loss_of(number: int, span: tuple[int, int], row: dict[str, Any]) -> float:
        return _loss(model, row).item()

    assert agreement.check("same", model, _ROWS, loss_of, reference, "float32") < 1e-4
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(module.p == 0.05 for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p)


@pytest.mark.parametrize("wrong", ["context", "adapter", "one token less"])
def test_a_different_loss_is_refused(reference: Path, wrong: str) -> None:
    model = _with_lora(seed=2)

    def loss_of(number: int, span: tuple[int, int], row: dict[str, Any]) -> float:
        if wrong == "context":  # as when dialogues in one sequence see each other
            before = _ROWS[number - 1]["input_ids"]
            row = {"input_ids": before + row["input_ids"], "labels": [-100] * len(before) + row["labels"]}
        elif wrong == "one token less":
            row = {**row, "labels": [-100 if n == span[1] - 1 else label for n, label in enumerate(row["labels"])]}
        if wrong != "adapter":
            return _loss(model, row).item()
        with model.disable_adapter():  # type: ignore[operator]
            return _loss(model, row).item()

    with pytest.raises(ProofError, match="of their spread apart"):
        agreement.check("wrong", model, _ROWS, loss_of, reference, "bfloat16")


@pytest.mark.parametrize(("scale", "agrees"), [(1.0, True), (1.5, False), (0.0, False)])
def test_a_different_gradient_is_refused(reference: Path, scale: float, agrees: bool) -> None:
    """A scale of 0 is what repacked 4-bit weights give: training runs and learns nothing."""
    model = _with_lora(seed=2)
    supervised = sum(end - start for row in _ROWS for start, end in row["reply_spans"])

    def backward() -> None:
        for _, (start, end), row in agreement.replies_of(_ROWS):
            (_loss(model, row) * (scale * (end - start) / supervised)).backward()

    if agrees:
        assert agreement.check_gradient("same", model, backward, reference, "float32") < 1e-4
    else:
        with pytest.raises(ProofError, match="gradient"):
            agreement.check_gradient("wrong", model, backward, reference, "bfloat16")


@given(st.lists(st.integers(1, 500), min_size=40, max_size=300), st.integers(20, 60))
def test_sampled_examples_have_the_mean_length_of_all(lengths: list[int], count: int) -> None:
    """An epoch is extrapolated from them, so the means may differ at most by the widest step between quantiles."""
    chosen = peers.spread([{"input_ids": [0] * length} for length in lengths], count)
    assert len(chosen) == min(count, len(lengths))
    mean = sum(len(example["input_ids"]) for example in chosen) / len(chosen)
    assert abs(mean - sum(lengths) / len(lengths)) <= (max(lengths) - min(lengths)) / len(chosen) + 1e-9


def test_one_example_per_turn_supervises_each_reply_once() -> None:
    examples = peers.turns_of(_ROWS)
    whole = [[token for start, end in row["reply_spans"] for token in row["input_ids"][start:end]] for row in _ROWS]
    parts = [[label for label in example["labels"] if label != -100] for example in examples]
    assert [*chain.from_iterable(parts)] == [*chain.from_iterable(whole)]
    assert all(len(example["input_ids"]) == len(example["labels"]) for example in examples)
    filled = peers.padded(examples[0], pad_id=11)
    assert {len(values) for values in filled.values()} == {512}
    assert filled["labels"] == filled["input_ids"] and sum(filled["attention_mask"]) == len(examples[0]["input_ids"])


def test_a_row_counts_the_dialogues_tokens_once() -> None:
    """Half an epoch of 1,000 tokens in 2 s makes 4 s per epoch, whatever was recomputed or padded."""
    system = System("some", "trl-turns", 8, 1, 5)
    facts = {"tokens": 1000, "linear_parameters": 10**6, "matrix_flops": 10**10}
    measured = {"seconds": 2.0, "processor_seconds": 1.9, "tokens": 500.0, "dialogues": 5.0}
    measured |= {"real": 3000, "positions": 4000}
    row = row_of(system, {**measured, "peak_bytes": 2**30, "loss_difference": 0.0}, facts)
    assert row["epoch_seconds"] == 4.0
    assert row["useful_tokens_per_second"] == 250.0
    assert row["padding_share"] == 0.25
    assert row["utilisation"] == 4 * 10**6 * 250 / 10**10
    refused = row_of(system, {"disagrees": "its loss is another"}, facts)
    assert "not timed: its loss is another" in table({"rows": [row, refused]})


def _status_of(script: str, *arguments: str) -> int:
    """The exit status of a benchmark, run in this process."""
    try:
        status: int = importlib.import_module(f"benchmarks.{script}").main([*arguments])
    except SystemExit as usage_error:
        status = int(usage_error.code or 0)
    return status


def test_each_system_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small model and few dialogues; with TRL if it is installed."""
    corpus = write_corpus(tmp_path / "corpus", dialogues=24)
    names = ["kestrel", "original", *(["trl-turns", "trl-dialogues", "trl-packed"] if find_spec("trl") else [])]
    output = tmp_path / "result.json"
    trial = ("--profile", "cpu", "--layers", "1", "--steps", "1", "--text", str(corpus), "--output", str(output))
    assert _status_of("train", *trial, "--only", *names) == 0
    printed = capsys.readouterr().out.rpartition("| system |")[2]
    record = json.loads(output.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == set(names)
    packed = rows.pop("trl-packed", None)
    assert packed is None or "disagrees" in packed, "packed dialogues no longer see each other: time it"
    for name, row in rows.items():
        assert 0 <= row["loss_difference"] < agreement.TOLERANCE[record["compute_dtype"]][0]
        assert row["epoch_seconds"] > 0 and row["peak_bytes"] > 2**20
        assert (row["padding_share"] > 0.5) == (name == "original")
        assert name in printed
    # Losses of one layer in float32 may be identical; gradients computed in different ways hardly ever are.
    assert 0 < rows["kestrel"]["gradient_difference"] < agreement.TOLERANCE[record["compute_dtype"]][1]
    assert record["versions"]["torch"] and record["date"] and record["device"]


def test_a_shape_is_checked_and_timed(tmp_path: Path) -> None:
    """Weights that are saved in 4 bit, LoRA on all layers, and steps of two passes; with TRL if it is installed."""
    corpus, output = write_corpus(tmp_path / "corpus", dialogues=64), tmp_path / "result.json"
    names = ["kestrel", *(["trl", "trl-checkpointing"] if find_spec("trl") else [])]
    trial = ("--profile", "gpu", "--shape", "tiny", "--layers", "1", "--steps", "1", "--text", str(corpus))
    assert _status_of("train", *trial, "--only", *names, "--output", str(output)) == 0
    record = json.loads(output.read_text())
    assert (record["shape"], record["layers"]) == ("tiny", 1) and [row["name"] for row in record["rows"]] == names
    for row in record["rows"]:
        assert 0 < row["gradient_difference"] < agreement.TOLERANCE[record["compute_dtype"]][1]
        assert row["step_tokens_per_second"]["median"] == row["step_tokens_per_second"]["fastest"] > 0
    ours = record["rows"][0]
    assert ours["start_to_first_step_seconds"] > 0 and ours["estimated_bytes"] > 2**20 and ours["recompute"] == "dense"
    assert len({row["timed_share_of_epoch"] for row in record["rows"]}) == 1  # the same dialogues


def test_records_name_no_paths_of_the_machine_and_profiles_name_configs_that_exist() -> None:
    typed = "--profile cpu --text /home/me/a.txt --output=/home/me/b.json --model /home/me/c --steps=3"
    recorded = "python benchmarks/train.py --profile cpu --text FILE --model FOLDER --steps=3"
    assert command_of("train.py", typed.split()) == recorded
    of_shapes = [profile_of(machine, shape) for machine in PROFILES for shape in (None, *SHAPES)]
    for profile in of_shapes:
        names = [system.name for system in profile.systems]
        assert len(set(names)) == len(names)
        assert all((ROOT / system.config).is_file() for system in profile.systems)


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train --profile cpu --only kestrel --text nowhere.txt", 1, "nowhere.txt: no such file"),
        ("evaluate --text nowhere.txt", 1, "nowhere.txt: no such file"),
        ("preprocess --text nowhere.txt", 1, "nowhere.txt: no such file"),
        ("train --profile cpu --only kestrle", 2, "trl-dialogues"),
        ("train --profile cpu --shape qwen", 2, "qwen2.5-7b"),
        ("train --profile gpu --shape falcon-7b --only unsloth", 2, "kestrel-10gb"),
        ("train --profile gpu --shape tiny --only unsloth", 1, "unsloth is not installed, which unsloth needs"),
        ("evaluate --replies 0", 2, "--replies"), ("evaluate --replies -1", 2, "--replies"),
        ("preprocess --dialogues 0", 2, "--dialogues"), ("preprocess --dialogues many", 2, "--dialogues"),
    ],
)  # fmt: skip
def test_mistakes(command: str, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status_of(*command.split()) == status
    said = capsys.readouterr().err
    assert message in said and (status == 2 or said.startswith("error: ") and said.count("\n") == 1)


def test_false_alarms_power_and_coverage_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that the docs' table can be filled from; below six dialogues nothing is said, so nothing is false."""
    corpus, output = write_corpus(tmp_path / "corpus", dialogues=24), tmp_path / "significance.json"
    options = f"--trials 3 --dialogues 5 8 --text {corpus} --output {output}"
    assert _status_of("significance", *options.split()) == 0
    few, enough, *bleu = json.loads(output.read_text())["results"]
    assert [row["metric"] for row in (few, enough, *bleu)] == ["f1", "f1", "bleu", "bleu"]
    assert (few["false alarms"], few["power"], few["coverage"]) == (0, 0, None)
    assert all(0 <= enough[key] <= 1 for key in enough if key not in ("metric", "dialogues", "trials"))
    p_values = np.array([0.01, 0.02, 0.02, 0.6])
    assert power_at(0.5, p_values, np.array([0.01, 0.02, 0.02, 0.02])) == pytest.approx((1 + 3 / 2) / 4)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    page = importlib.import_module("fill_significance")
    monkeypatch.setattr(page, "RECORD", output)
    assert page.blocks()["significance"].count(" none ") == 6


def test_preprocess_and_evaluate_are_timed(tmp_path: Path) -> None:
    assert _status_of("preprocess", "--dialogues", "50", "--output", str(tmp_path)) == 0
    record = json.loads((tmp_path / "preprocess-50.json").read_text())
    assert record["dialogues"] == 50 and record["peak_resident_bytes"] > 2**24
    assert record["command"] == "python benchmarks/preprocess.py --dialogues 50"
    options = f"--replies 30 --resamples 100 --repeats 1 --output {tmp_path / 'evaluate.json'}"
    assert _status_of("evaluate", *options.split()) == 0
    record = json.loads((tmp_path / "evaluate.json").read_text())
    assert (record["replies"], record["systems"]) == (30, 2) and record["seconds"] > 0
