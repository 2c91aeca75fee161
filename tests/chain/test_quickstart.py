"""The quickstart as a user runs it: the four commands, and the results they must reach."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("preprocess.py", "train.py", "generate.py", "evaluate.py")
TRIVIAL = ("copy_partner", "random_persona", "random_reply", "constant_reply")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after all four scripts."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    for script in SCRIPTS:
        command = [sys.executable, script, "--config", "configs/quickstart.yaml", "--run_dir", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return folder


def _systems(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    systems: dict[str, Any] = metrics["systems"]
    return systems


@pytest.mark.parametrize("metric", ["bleu", "rouge_l"])
def test_adapter_beats_base_and_trivial_systems_with_disjoint_intervals(run: Path, metric: str) -> None:
    systems = _systems(run)
    low = systems["adapter"][metric]["ci95"][0]
    for other in ("base", *TRIVIAL):
        assert low > systems[other][metric]["ci95"][1], (
            f"adapter's {metric} from {low}; {other}: {systems[other][metric]}"
        )


def test_adapter_learned_to_stop_and_to_predict(run: Path) -> None:
    systems = _systems(run)
    assert systems["adapter"]["stopped_by_eos"] > 0.95
    assert systems["base"]["stopped_by_eos"] < 0.5
    assert systems["adapter"]["perplexity"]["token"] < 0.5 * systems["base"]["perplexity"]["token"]


def test_run_folder_is_complete(run: Path) -> None:
    expected = (
        "config.yaml", "dataset/manifest.json", "dataset/statistics.json", "dataset/train/data-00000-of-00001.arrow",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/prompt.json",
        "adapter/manifest.json", "adapter/tokenizer.json", "logs/training.jsonl", "logs/loss.png", "samples.jsonl",
        "generations/test.adapter.jsonl", "generations/test.base.jsonl", "generations/manifest.json",
        "evaluation/metrics.json", "evaluation/report.html",
    )  # fmt: skip
    missing = [name for name in expected if not (run / name).exists()]
    assert not missing
    assert list((run / "logs").glob("events.*")), "no TensorBoard events"
    assert not list(run.rglob("*.incomplete-*")) and not list(run.rglob("*.partial"))


def test_manifest_records_the_4_bit_audit(run: Path) -> None:
    audit = json.loads((run / "adapter" / "manifest.json").read_text(encoding="utf-8"))["audit"]
    assert audit["bits"] == 4 and audit["layers_4bit"] == audit["layers_expected"] > 0
    assert audit["quant_type"] == "nf4" and audit["double_quant"]


def test_nothing_was_dropped(run: Path) -> None:
    statistics = json.loads((run / "dataset" / "statistics.json").read_text(encoding="utf-8"))
    for split in statistics["splits"].values():
        assert split["dropped_at_rendering"] == {} and split["turns_cut"] == 0
