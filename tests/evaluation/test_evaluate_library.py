"""Metrics of the library `evaluate`, which has the name of our script."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT, make_run, read_metrics, script

main = script("evaluate").main

METRIC = """
import datasets
import evaluate


class Shortness(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features({"predictions": text, "references": text})
        )

    def _compute(self, predictions, references):
        shorter = [len(p) < len(r) for p, r in zip(predictions, references)]
        return {"shorter": shorter, "any": any(shorter), "remark": "not a number"}
"""


@pytest.fixture
def config(tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def options(tmp_path, config):
    """That score the run with a metric of its own."""
    folder = tmp_path / "metrics" / "shortness"
    folder.mkdir(parents=True)
    (folder / "shortness.py").write_text(METRIC, encoding="utf-8")
    few = ["--evaluation.resamples", "100", "--evaluation.samples", "0"]
    return ["--config", str(config), *few, "--evaluation.extra_metrics", str(folder)]


def check_shortness(config: Path) -> None:
    systems = read_metrics(config)["systems"]
    assert systems["gold"]["extra"] == {"shortness": {"shorter": 0.0, "any": 0.0}}
    assert systems["base"]["extra"]["shortness"]["any"] == 1.0
    assert 0 < systems["base"]["extra"]["shortness"]["shorter"] < 1


def test_metrics_of_the_library_from_the_command_line(tmp_path, config, options):
    """Started in the repository, where `import evaluate` is the script."""
    # The library takes transformers along where it is installed, for seconds, and does without it where it is not.
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')", encoding="utf-8")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "evaluate.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "shortness: shorter" in done.stdout
    check_shortness(config)


def test_metrics_of_the_library_under_pytest(tmp_path, config, options, monkeypatch):
    """Here `import evaluate` may be the script already; the helper must find the library all the same."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(ROOT))
    before = sys.modules.pop("evaluate", None)
    try:
        assert "run_script" in vars(importlib.import_module("evaluate"))  # ours, by sys.path
        assert main(options) == 0
        check_shortness(config)
        assert hasattr(sys.modules["evaluate"], "EvaluationModule")
    finally:
        if before is not None:
            sys.modules["evaluate"] = before
