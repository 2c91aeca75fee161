"""Several processes make what one makes, write it once, and end together."""

from __future__ import annotations

import json
import shutil
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch
from launching import ACCELERATE, PATIENCE, TORCHRUN, begin, end, free_port
from make_models import settings_of, write_config, write_corpus
from safetensors.torch import load_file
from scripts import ROOT, rows_in

from kestrel.config.settings import Quantization
from kestrel.model.base import load_base


def run(*command: str, launcher: list[str] = TORCHRUN) -> tuple[int, str, str]:
    return end(begin(*command, launcher=launcher))


def sabotaged(path: Path, script: str, sabotage: str) -> str:
    """A script like `script`, whose second process first runs some lines that break it."""
    lines = textwrap.indent(textwrap.dedent(sabotage).strip(), "    ")
    path.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom kestrel.errors import KestrelError\n"
        f"if os.environ['RANK'] == '1':\n{lines}\nimport {script}\nsys.exit({script}.main())\n",
        encoding="utf-8",
    )
    return str(path)


def assert_same_training(one: Path, other: Path) -> None:
    """The same losses and the same adapter, within 1e-4."""
    logs = (rows_in(folder / "logs" / "training.jsonl") for folder in (one, other))
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    weights, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def alone(assets, tmp_path_factory):
    """One process's training, as arguments and run folder. The last step of each epoch has one dialogue, and so has
    validation, so that of two processes one has nothing to do."""
    import preprocess
    import train

    folder = tmp_path_factory.mktemp("alone")
    write_corpus(folder / "corpus", 16, test=100)
    validation = folder / "corpus" / "validation.jsonl"
    validation.write_text(validation.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    config = write_config(folder / "c.yaml", assets / "base", folder / "corpus", folder / "run")
    # Dropout draws for what a process computes, so it is what differs between numbers of processes.
    arguments = ["--config", str(config), "--lora.dropout", "0", "--training.batch_size", "5"]
    arguments += ["--training.learning_rate", "1e-3", "--generation.tokens_per_step", "64"]
    arguments += ["--training.keep_checkpoints", "4"]
    assert preprocess.main(arguments) == 0
    shutil.copytree(folder / "run", folder / "prepared")
    assert train.main(arguments) == 0
    return arguments, folder / "run", folder / "prepared"


@pytest.mark.parametrize(("name", "saved_in"), [("ddp", 16), ("fsdp", 16), ("fsdp", 4), ("multi-node", 16)])
def test_two_processes_train_what_one_does(alone, assets, tmp_path, name, saved_in):
    """As accelerate starts them with our files, which ask for GPUs, where there are none. Sharded, both have to make the
    same number of passes, so small ones are made, of which one process needs more."""
    arguments, one, prepared = alone
    shutil.copytree(prepared, tmp_path / "run")
    command = ["train.py", *arguments, "--run_dir", str(tmp_path / "run")]
    if saved_in == 4:
        shutil.copytree(assets / "base", tmp_path / "base")
        exact = Quantization(compute_dtype="float32")
        load_base(settings_of(assets / "base", quantization=exact))[0].save_pretrained(tmp_path / "base")
        command += ["--model.name", str(tmp_path / "base")]
    launcher = [*ACCELERATE, "--config_file", f"configs/accelerate/{name}.yaml", "--num_processes", "2"]
    if name == "multi-node":
        launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
        machines = [begin(*command, launcher=[*launcher, "--machine_rank", each]) for each in "01"]
        status, out, err = end(*machines)
    else:
        if name == "fsdp":
            command += ["--training.tokens_per_step", "96", "--training.recompute", "full"]
        status, out, err = run(*command, launcher=launcher)
    assert status == 0, err
    once = ("trainable parameters", "step 8 of 8: ", "proven: saved")
    assert [out.count(said) for said in once] == [1, 1, 1], "the first process alone prints"
    assert ("this process holds 50%" in out) is (name == "fsdp")
    assert_same_training(one, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".processes*"))
    states = (tmp_path / "run" / "checkpoints" / "checkpoint-8").glob("rng_state_*.pth")
    seeds = [torch.load(path, weights_only=False)["cpu"][:8] for path in states]  # with which a state begins
    assert len(seeds) == 2 and not torch.equal(*seeds), "dropout in one is not dropout in the other"


def test_a_run_of_one_process_resumes_in_two_of_which_one_has_less_memory(alone, tmp_path):
    """The second process runs out of memory again and again; the first one does not wait in vain, and the steps stay what
    they are. Its passes count for both from the next checkpoint on."""
    arguments, one, _ = alone
    shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}")
    script = sabotaged(
        tmp_path / "sabotaged.py",
        "train",
        """
        import torch
        from kestrel.training import objective
        def exhausted(model, batch, whole=objective.token_nll):
            nll = whole(model, batch)
            if torch.is_grad_enabled() and not all(module.training for module in model.modules()):
                raise KestrelError("a training step without dropout")
            if model.training and batch["input_ids"].numel() > 100 and len(batch["input_ids"]) > 1:
                nll.sum().backward()  # gradients that must not stay
                raise torch.OutOfMemoryError("CUDA out of memory")
            return nll
        objective.token_nll = exhausted
        """,
    )
    status, out, err = run(script, *arguments, "--run_dir", str(tmp_path / "run"))
    assert status == 0, err
    assert "resuming from " in out and "checkpoint-2" in out
    assert_same_training(one, tmp_path / "run")
    files = [tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "passes.json" for step in (2, 4, 8)]
    before, after, last = (json.loads(path.read_text())["chosen"]["tokens_per_step"] for path in files)
    assert after < before and f"at most {after:,} tokens (training.tokens_per_step) in every process" in out
    assert out.count("another process was out of memory") == 1 + (last < after)


def test_one_process_resumes_from_the_checkpoint_of_a_terminated_launcher(alone, tmp_path, capsys):
    import train

    arguments, _, prepared = alone
    shutil.copytree(prepared, tmp_path / "one")
    shutil.copytree(prepared, tmp_path / "run")
    arguments = [*arguments, "--training.max_steps", "80", "--training.evaluations", "20"]
    process = begin("train.py", *arguments, "--run_dir", str(tmp_path / "run"))
    next(line for line in process.stdout if line.startswith("step "))
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert err.count("train.py: stopped at step ") == 1 and "the same command resumes from there" in err, err
    assert not (tmp_path / "run" / "adapter").exists()
    capsys.readouterr()
    assert train.main([*arguments, "--run_dir", str(tmp_path / "run")]) == 0
    assert "resuming from " in capsys.readouterr().out
    assert train.main([*arguments, "--run_dir", str(tmp_path / "one")]) == 0
    # Saving begins a new window of the logged loss, and the losses here are logged at each step.
    assert_same_training(tmp_path / "one", tmp_path / "run")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ('raise KestrelError("the second process has had enough")', "the second process has had enough"),
        (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", "another process of this run ended without a message"),
    ],
    ids=["error", "killed"],
)
def test_the_end_of_one_process_ends_both_and_is_reported_once(alone, tmp_path, how, message, capsys):
    """One alone then resumes."""
    import train

    arguments, one, prepared = alone
    shutil.copytree(prepared, tmp_path / "run")
    script = sabotaged(
        tmp_path / "sabotaged.py",
        "train",
        f"""
        from kestrel.training import trainer as training
        def fail(self, inputs, whole=training.DialogueTrainer._backward):
            if self.state.global_step == 3:
                {how}
            return whole(self, inputs)
        training.DialogueTrainer._backward = fail
        """,
    )
    began = time.monotonic()
    status, _, err = run(script, *arguments, "--run_dir", str(tmp_path / "run"))
    assert status != 0 and time.monotonic() - began < PATIENCE / 2
    (printed,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert printed.startswith(f"train.py: {message}")
    assert not (tmp_path / "run" / "adapter").exists()
    if "os.kill" in how:
        assert train.main([*arguments, "--run_dir", str(tmp_path / "run")]) == 0
        assert "resuming from " in capsys.readouterr().out
        assert_same_training(one, tmp_path / "run")


def test_two_processes_answer_what_one_does_even_if_they_were_interrupted(alone, tmp_path, capsys):
    """100 dialogues are four shards. In the first call the second process fails at its second one."""
    import generate

    arguments, one, _ = alone
    assert generate.main(arguments) == 0
    whole = {path.name: path.read_bytes() for path in (one / "generations").glob("*.jsonl")}
    assert len(whole) == 2 and min(map(len, whole.values())) > 10_000
    two = tmp_path / "run"
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("generations"))
    command = [*arguments, "--run_dir", str(two)]
    script = sabotaged(
        tmp_path / "sabotaged.py",
        "generate",
        """
        from kestrel.generation import answers
        calls = []
        def fail(*given, whole=answers.answer):
            calls.append(given)
            if len(calls) == 2:
                raise KestrelError("the second process has had enough")
            return whole(*given)
        answers.answer = fail
        """,
    )
    status, _, err = run(script, *command)
    printed = [line for line in err.splitlines() if line.startswith("generate.py: ")]
    assert status != 0 and printed == ["generate.py: the second process has had enough"]
    shutil.copytree(two, tmp_path / "again")

    status, out, err = run("generate.py", *command)
    assert status == 0, err
    assert out.count("resuming after 64 dialogues") == 1
    assert {path.name: path.read_bytes() for path in (two / "generations").glob("*.jsonl")} == whole
    capsys.readouterr()
    assert generate.main([*arguments, "--run_dir", str(tmp_path / "again")]) == 0
    assert "resuming after 64 dialogues" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "again" / "generations").glob("*.jsonl")} == whole
