"""The adapter that the original project published is scored beside ours, with the config shipped for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from experiment import Experiment
from hub_state import Hub
from publishing_runs import run
from scripts import rows_in

from kestrel.runtime.atomic import read_json, write_json

CONFIG = "configs/falcon-7b-original.yaml"
BASE, ADAPTER = "tiiuae/falcon-7b", "HarshBhati/Falcon-7b-FineTuned-weights"


def test_one_table_has_both_adapters(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    """Tiny models under the real names; the real dialogues are replaced too, since a test has no network."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shutil.copy(evaluated.run / "adapter" / "adapter_model.safetensors", theirs)
    written = read_json(evaluated.run / "adapter" / "adapter_config.json", "")
    write_json(theirs / "adapter_config.json", {**written, "base_model_name_or_path": BASE})
    hub.add(BASE, evaluated.base)
    hub.add(ADAPTER, theirs)
    smaller = ["--run_dir", str(tmp_path / "run"), "--data.source", str(evaluated.source)]
    smaller += ["--quantization.compute_dtype", "float32", "--generation.max_new_tokens", "8"]
    for script in ("preprocess.py", "generate.py"):
        done = run(script, "--config", CONFIG, *smaller, hub=hub, home=tmp_path / "home", token=None)
        assert done.status == 0, done.said
    assert "not proven: this adapter was not made by Kestrel" in done.said

    files = [folder / "generations" / "test.adapter.jsonl" for folder in (evaluated.run, tmp_path / "run")]
    more = ["--evaluation.generations", *map(str, files), "--evaluation.resamples", "100"]
    done = run("evaluate.py", "--config", CONFIG, *smaller, *more, hub=hub, home=tmp_path / "home", token=None)
    assert done.status == 0, done.said
    (written,) = (tmp_path / "run").glob("evaluation-*/metrics.json")
    metrics = json.loads(written.read_text())
    scored = [name for name, entry in metrics["systems"].items() if entry["kind"] == "system"]
    assert len(scored) == 2 and metrics["n_replies"] > 0
    ours, original = map(rows_in, files)
    keys = ("dialogue_id", "turn", "reference")
    assert [[row[key] for key in keys] for row in ours] == [[row[key] for key in keys] for row in original]
    assert [row["reference_nll"] for row in ours] != [row["reference_nll"] for row in original], "another prompt"
