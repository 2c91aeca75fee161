"""The whole chain through the command lines, each script in a process of its own, as a user runs it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from make_models import write_config, write_corpus
from transformers import AutoTokenizer

from kestrel.data.dataset import load_split
from kestrel.generation.answers import questions_of
from kestrel.prompt.prompt import Prompt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def chain(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The run folder and what each script printed; 16-token answers, every candidate scored."""
    folder = tmp_path_factory.mktemp("chain")
    source = write_corpus(folder / "corpus", 40, candidates=True)
    extra = "  candidates: true\nevaluation:\n  resamples: 100\n"
    config = write_config(folder / "config.yaml", assets / "base", source, folder / "run", extra)
    printed = {}
    for script in ("preprocess.py", "train.py", "generate.py", "evaluate.py"):
        more = ["--training.max_steps", "60", "--training.logging_steps", "5"]
        command = [sys.executable, script, "--config", str(config), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", f"{script} warns: {done.stderr}"
        printed[script] = done.stdout
    return folder / "run", printed


def test_run_folder_is_what_the_contract_says(chain):
    run, _ = chain
    for name in (
        "config.yaml", "dataset/train", "dataset/validation", "dataset/test", "dataset/manifest.json",
        "dataset/statistics.json", "checkpoints", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
        "adapter/tokenizer.json", "adapter/prompt.json", "adapter/manifest.json", "logs/training.jsonl",
        "logs/loss.png", "samples.jsonl", "generations/test.adapter.jsonl", "generations/test.base.jsonl",
        "generations/manifest.json", "evaluation/metrics.json", "evaluation/report.html",
    ):  # fmt: skip
        assert (run / name).exists(), name
    assert list((run / "logs").glob("events.out.tfevents.*"))
    assert not [path for path in run.rglob("*") if "incomplete" in path.name or "partial" in path.name]


def test_each_manifest_says_what_and_of_what(chain):
    run, _ = chain
    manifests = {
        name: json.loads((run / name / "manifest.json").read_text()) for name in ("dataset", "adapter", "generations")
    }
    for manifest in manifests.values():
        assert manifest["schema_version"] == 1
        assert {"torch", "transformers", "peft", "bitsandbytes"} <= manifest["versions"].keys()
    adapter = manifests["adapter"]
    assert adapter["audit"]["layers_4bit"] == adapter["audit"]["layers_expected"] == 8
    assert adapter["settings"]["quantization"]["bits"] == 4 and adapter["trainable_parameters"] > 0
    of_adapter = manifests["generations"]["generations"]["test.adapter.jsonl"]["made_from"]
    assert of_adapter["dataset"] == adapter["made_from"]["dataset"]
    assert of_adapter["base"] == adapter["made_from"]["base"]


def test_training_taught_something(chain):
    """A frozen random base learns little, but what the replies share it learns: likelier references, known ends."""
    run, printed = chain
    log = map(json.loads, (run / "logs" / "training.jsonl").read_text().splitlines())
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[-1] < losses[0]
    systems = json.loads((run / "evaluation" / "metrics.json").read_text())["systems"]
    assert systems["adapter"]["perplexity"]["token"] < 0.5 * systems["base"]["perplexity"]["token"]
    rows = [json.loads(line) for line in (run / "generations" / "test.adapter.jsonl").read_text().splitlines()]
    nats, tokens = (sum(row[key] for row in rows) for key in ("reference_nll", "reference_tokens"))
    assert systems["adapter"]["perplexity"]["token"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert "proven: saved and loaded adapter agree to the bit" in printed["train.py"]
    assert "8 of 8 linear layers in nf4, double quantization" in printed["generate.py"]


def test_the_prompt_that_trained_is_the_prompt_that_generates(chain, assets):
    """Token for token: each prompt is the training sequence up to its reply."""
    run, _ = chain
    prompt = Prompt(AutoTokenizer.from_pretrained(assets / "base"), "plain", 160)
    rows = list(load_split(run / "dataset", "test", ""))
    for row, questions in zip(rows, questions_of(rows, prompt), strict=True):
        assert len(questions) == len(row["reply_spans"])
        for question, (start, end) in zip(questions, row["reply_spans"], strict=True):
            assert [*question.context, *question.reference] == row["input_ids"][:end]
            assert question.context == prompt.context(question.dialogue, question.turn)
            assert row["labels"][start:end] == question.reference and question.reference[-1] == 11
