"""The quickstart as a user runs it: the four commands, the artifacts they write, and the results they must reach."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from children import ROOT, python
from scripts import rows_in
from transformers import AutoTokenizer

from kestrel.data.dataset import load_split
from kestrel.generation.answers import questions_of
from kestrel.prompt.prompt import Prompt

TRIVIAL = ("copy_partner", "random_persona", "random_reply", "constant_reply")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The run folder after all four scripts, and what each of them printed."""
    folder, printed = tmp_path_factory.mktemp("quickstart") / "run", {}
    for script in ("preprocess.py", "train.py", "generate.py", "evaluate.py"):
        done = python(script, "--config", "configs/quickstart.yaml", "--run_dir", str(folder))
        assert (done.returncode, done.stderr) == (0, ""), f"{script}\n{done.stdout}\n{done.stderr}"
        printed[script] = done.stdout
    return folder, printed


@pytest.fixture(scope="module")
def run(quickstart: tuple[Path, dict[str, str]]) -> Path:
    return quickstart[0]


@pytest.fixture(scope="module")
def systems(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation" / "metrics.json").read_text(encoding="utf-8"))["systems"]


@pytest.mark.parametrize("metric", ["bleu", "rouge_l"])
def test_adapter_beats_base_and_trivial_systems_with_disjoint_intervals(systems, metric):
    low = systems["adapter"][metric]["ci95"][0]
    for other in ("base", *TRIVIAL):
        assert low > systems[other][metric]["ci95"][1], f"{metric} from {low}; {other}: {systems[other][metric]}"


def test_adapter_learned_to_stop_and_to_predict(run, systems):
    assert systems["adapter"]["stopped_by_eos"] > 0.95
    assert systems["base"]["stopped_by_eos"] < 0.5
    assert systems["adapter"]["perplexity"]["token"] < 0.5 * systems["base"]["perplexity"]["token"]
    losses = [line["eval_loss"] for line in rows_in(run / "logs" / "training.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    rows = rows_in(run / "generations" / "test.adapter.jsonl")
    nats, tokens = (sum(row[key] for row in rows) for key in ("reference_nll", "reference_tokens"))
    assert systems["adapter"]["perplexity"]["token"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)


def test_memory_is_within_20_percent_of_what_was_said_before_the_first_step(quickstart):
    said = quickstart[1]["train.py"]
    estimate = re.search(r"about ([\d.]+) of [\d.]+ GiB of memory", said)
    peak = re.search(r"([\d.]+) GiB of memory at the peak", said)
    assert estimate and peak, said
    # Both are printed with one digit after the point.
    assert abs(float(estimate[1]) - float(peak[1])) <= 0.2 * float(peak[1]) + 0.05


def test_run_folder_is_complete(run):
    expected = (
        "config.yaml", "dataset/manifest.json", "dataset/statistics.json", "dataset/train/data-00000-of-00001.arrow",
        "dataset/validation", "dataset/test", "checkpoints", "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json", "adapter/prompt.json", "adapter/manifest.json", "adapter/tokenizer.json",
        "logs/training.jsonl", "logs/loss.png", "samples.jsonl", "generations/test.adapter.jsonl",
        "generations/test.base.jsonl", "generations/manifest.json", "evaluation/metrics.json", "evaluation/report.html",
    )  # fmt: skip
    assert [name for name in expected if not (run / name).exists()] == []
    assert list((run / "logs").glob("events.*")), "no TensorBoard events"
    assert not [path for path in run.rglob("*") if "incomplete" in path.name or "partial" in path.name]


def test_manifests_record_the_4_bit_audit_and_what_each_artifact_was_made_from(quickstart):
    run, printed = quickstart
    names = ("dataset", "adapter", "generations")
    manifests = {name: json.loads((run / name / "manifest.json").read_text()) for name in names}
    for manifest in manifests.values():
        assert manifest["schema_version"] == 1
        assert {"torch", "transformers", "peft", "bitsandbytes"} <= manifest["versions"].keys()
    adapter = manifests["adapter"]
    assert adapter["settings"]["quantization"]["bits"] == 4 and adapter["trainable_parameters"] > 0
    audit, layers = adapter["audit"], adapter["audit"]["layers_expected"]
    assert audit["bits"] == 4 and audit["layers_4bit"] == layers > 0
    assert audit["quant_type"] == "nf4" and audit["double_quant"]
    assert f"{layers} of {layers} linear layers in nf4, double quantization" in printed["generate.py"]
    assert "proven: saved and loaded adapter agree to the bit" in printed["train.py"]
    of_answers = manifests["generations"]["generations"]["test.adapter.jsonl"]["made_from"]
    assert all(of_answers[key] == adapter["made_from"][key] for key in ("dataset", "base"))


def test_nothing_was_dropped(run):
    statistics = json.loads((run / "dataset" / "statistics.json").read_text(encoding="utf-8"))
    for split in statistics["splits"].values():
        assert split["dropped_at_rendering"] == {} and split["turns_cut"] == 0


def test_the_prompt_that_trained_is_the_prompt_that_generates(run):
    """Token for token: each prompt is the training sequence up to its reply."""
    prompt = Prompt(AutoTokenizer.from_pretrained(ROOT / "quickstart" / "base"), "plain", 512)
    rows = list(load_split(run / "dataset", "test", ""))
    for row, questions in zip(rows, questions_of(rows, prompt), strict=True):
        assert len(questions) == len(row["reply_spans"])
        for question, (start, end) in zip(questions, row["reply_spans"], strict=True):
            assert [*question.context, *question.reference] == row["input_ids"][:end]
            assert question.context == prompt.context(question.dialogue, question.turn)
            assert row["labels"][start:end] == question.reference and question.reference[-1] == 11
