"""Users' mistakes and damaged files: one clear message, the right exit status, nothing half-written."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import python, start
from experiment import Experiment
from make_models import make_tokenizer, write_base
from scripts import script, snapshot


class Desk:
    """A copy of an experiment's run folder, and ways to break things around it."""

    def __init__(self, experiment: Experiment, tmp_path: Path):
        self.experiment, self.tmp = experiment, tmp_path
        self.run = tmp_path / "run"
        self.options: list[str] = experiment.copy_to(self.run)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.run / name)

    def flip(self, name: str) -> None:
        content = bytearray((self.run / name).read_bytes())
        content[len(content) // 2] ^= 16
        (self.run / name).write_bytes(content)

    def config(self, old: str, new: str) -> None:
        text = self.experiment.config.read_text()
        assert old in text
        (self.tmp / "changed.yaml").write_text(text.replace(old, new))
        self.options = ["--config", str(self.tmp / "changed.yaml"), "--run_dir", str(self.run)]

    def add(self, *options: str) -> None:
        self.options += options

    def other_base(self, **shape: int) -> Path:
        """A base of another shape or seed, as model.name."""
        self.add("--model.name", str(self.tmp / "other"))
        return write_base(self.tmp / "other", **shape)


def other_tokenizer(desk: Desk) -> None:
    base = desk.tmp / "retokenized"
    shutil.copytree(desk.experiment.base, base)
    make_tokenizer(vocabulary=350).save_pretrained(base)
    desk.add("--model.name", str(base))


def damaged_generations(desk: Desk) -> None:
    (desk.run / "generations").mkdir(exist_ok=True)
    (desk.run / "generations" / "manifest.json").write_text("{")
    (desk.run / "generations" / "test.base.jsonl").write_text("{}\n")
    desk.add("--generation.systems", "base")


def shortened(desk: Desk, name: str) -> None:
    path = desk.run / name
    path.write_bytes(path.read_bytes()[:-40])


def weights_truncated(desk: Desk) -> None:
    path = desk.other_base() / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    desk.remove("checkpoints")


# name: (prepare, script, exit status, what the message says)
FAULTS: dict[str, tuple[Callable[[Desk], object], str, int, list[str]]] = {
    "evaluate before generate": (lambda d: None, "evaluate", 1, ["generate.py"]),
    "several problems at once": (
        lambda d: d.config("batch_size: 4", "batch_size: 0\n  nonsense: 1"), "train", 2,
        ["2 problems", "training.batch_size", "training.nonsense"],
    ),
    "dataset of another tokenizer": (other_tokenizer, "train", 1, ["tokenizer_sha256", "python preprocess.py"]),
    "dataset of other data": (
        lambda d: d.add("--data.max_dialogues", "3"), "train", 1, ["data.max_dialogues", "preprocess.py"],
    ),
    "dataset of another prompt": (
        lambda d: d.add("--prompt.max_length", "99"), "generate", 1, ["prompt.max_length", "preprocess.py"],
    ),
    "damaged Arrow": (
        lambda d: d.flip("dataset/train/data-00000-of-00001.arrow"), "train", 1,
        ["data-00000-of-00001.arrow is damaged", "python preprocess.py"],
    ),
    "damaged Arrow of the split that is answered": (
        lambda d: shortened(d, "dataset/test/data-00000-of-00001.arrow"), "generate", 1, ["arrow is damaged"],
    ),
    "damaged dataset manifest": (
        lambda d: shortened(d, "dataset/manifest.json"), "train", 1, ["manifest.json is damaged", "preprocess.py"],
    ),
    "damaged adapter": (
        lambda d: d.flip("adapter/adapter_model.safetensors"), "generate", 1,
        ["adapter_model.safetensors is damaged", "python train.py"],
    ),
    "adapter without its manifest": (
        lambda d: (d.run / "adapter/manifest.json").unlink(), "generate", 1, ["manifest.json does not exist", "train.py"],
    ),
    "adapter's prompt was edited": (
        lambda d: d.flip("adapter/prompt.json"), "generate", 1, ["prompt.json is damaged or was edited"],
    ),
    "no such adapter": (
        lambda d: d.add("--model.adapter", "nowhere"), "generate", 1, ["model.adapter nowhere: no such folder"],
    ),
    "base changed since training": (
        lambda d: d.other_base(seed=1), "generate", 1, ["base.files.model.safetensors", "python train.py"],
    ),
    "base of another shape since training": (
        lambda d: d.other_base(hidden=128), "generate", 1, ["base.files.config"],
    ),
    "quantization changed since training": (
        lambda d: d.add("--quantization.type", "fp4"), "generate", 1,
        ["quantization.type: it was 'nf4', now 'fp4'", "python train.py"],
    ),
    "damaged manifest of generations": (damaged_generations, "generate", 1, ["manifest.json is damaged", "delete"]),
    "model folder that does not exist": (
        lambda d: d.add("--model.name", "no/such/model"), "train", 1, ["model.name 'no/such/model'"],
    ),
    "model folder without a configuration": (
        lambda d: (d.other_base() / "config.json").unlink(), "train", 1, ["model.name", "holds no config.json", "copy the whole folder"],
    ),
    "model weights cut short": (weights_truncated, "train", 1, ["model.safetensors is damaged or cut off", "copy or download it again"]),
    "layers that the model does not have": (
        lambda d: (d.remove("checkpoints"), d.add("--lora.target_modules", "q_proj")), "train", 1,
        ["lora.target_modules", "query_key_value"],
    ),
    "split that does not exist": (
        lambda d: shutil.rmtree(d.run / "dataset" / "test"), "generate", 1, ["test", "preprocess.py"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, trained, tmp_path, capfd):
    prepare, name, status, says = FAULTS[fault]
    desk = Desk(trained, tmp_path)
    prepare(desk)
    before = snapshot(desk.run)
    capfd.readouterr()
    assert script(name).main(desk.options) == status
    said = capfd.readouterr().err
    assert said.startswith(f"{name}.py: ") and "Traceback" not in said and "unexpected" not in said, said
    for part in says:
        assert part in said, said
    assert snapshot(desk.run) == before


@pytest.mark.parametrize(("name", "missing"), [("train", "dataset"), ("generate", "dataset"), ("generate", "adapter")])
def test_a_missing_artifact_comes_before_anything_heavy(trained, tmp_path, name, missing):
    desk = Desk(trained, tmp_path)
    desk.remove(missing)
    before = snapshot(desk.run)
    code = f"import sys, {name}; status = {name}.main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else status)"
    done = python("-c", code, *desk.options)
    remedy = {"dataset": "make it with: python preprocess.py", "adapter": "train it with: python train.py"}[missing]
    assert done.returncode == 1 and f"there is no {missing} in " in done.stderr and remedy in done.stderr
    assert snapshot(desk.run) == before


def test_a_closed_pipe_does_not_end_the_run(prepared, tmp_path):
    """`preprocess.py | head`: the dataset is made, and no message is about the pipe."""
    process = start("preprocess.py", *prepared.arguments("--run_dir", str(tmp_path / "run")))
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and "ipe" not in said and "Traceback" not in said, said
    assert (tmp_path / "run" / "dataset" / "manifest.json").exists()


@pytest.mark.parametrize("milliseconds", [60, 120, 240, 480, 960])
def test_interrupted_while_it_imports(prepared, tmp_path, milliseconds):
    """Ctrl-C at any moment after the standard library's imports: no traceback, and the shell's status 130."""
    code = """if True:
        import runpy, sys, kestrel.runtime.command_line
        sys.argv = ["train.py", *sys.argv[1:]]
        print("now", flush=True)
        runpy.run_path("train.py", run_name="__main__")
    """
    process = start("-c", code, *prepared.copy_to(tmp_path / "run"))
    process.stdout.readline()
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said


def test_without_a_network_the_hub_is_asked_once(tmp_path):
    """A model that is neither here nor in the cache, and a Hub that refuses the connection."""
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\ndata: {{source: {__file__}}}\nmodel: {{name: nobody/nothing}}\n")
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": ""}
    done = python("preprocess.py", "--config", str(config), **hub)
    assert done.returncode == 1 and "cannot load the tokenizer of model.name 'nobody/nothing'" in done.stderr
    assert done.stderr.count("\n") <= 2 and "Retrying" not in done.stderr, done.stderr
