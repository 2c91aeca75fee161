"""What the processes of one run check of one another before they begin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launching import ROOT, free_port

from benchmarks.profiles import script
from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.runtime import rendezvous


@pytest.mark.parametrize("exists", [True, False])
def test_a_dry_run_needs_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    looked_for = []
    monkeypatch.setattr(rendezvous, "_appears", lambda path: looked_for.append(path.exists()) or True)
    run_dir = tmp_path if exists else tmp_path / "new"
    tree = {"run_dir": str(run_dir), "data": {"source": "s"}, "model": {"name": "m"}}
    rendezvous._require_same(Settings.model_validate(tree))
    assert looked_for == [True] * exists and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("left", "found"),
    [
        ({"RANK": "1"}, "RANK=1, perhaps left"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2, RANK=1 without MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2, MASTER_ADDR=a"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='', which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK='x', which is no number"),
    ],
)
@pytest.mark.parametrize("name", ["preprocess", "train"])
def test_variables_that_another_launcher_left_are_refused(name, left, found, monkeypatch, capsys):
    """With RANK=1 alone, a script used to say nothing, do nothing, and end with 0."""
    for variable, value in left.items():
        monkeypatch.setenv(variable, value)
    assert script(name).main(["--config", "configs/quickstart.yaml"]) == 1
    out, err = capsys.readouterr()
    assert not out and found in err and "unset WORLD_SIZE RANK LOCAL_RANK" in err and err.count("\n") == 1


def test_a_process_that_waits_for_others_in_vain_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    code = (
        "from kestrel.config.settings import Settings\nfrom kestrel.runtime import rendezvous, signals\n"
        "settings = Settings.model_validate({'run_dir': 'r', 'data': {'source': 's'}, 'model': {'name': 'm'}})\n"
        "with signals.on_signals(signals.exit_now):\n    rendezvous.join_processes(settings)\n"
    )
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**os.environ, **left, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    ended_at_last = threading.Timer(120, process.kill)  # else a process that says nothing would hold the test for ever
    ended_at_last.start()
    said = process.stderr.readline()
    assert said.startswith("process 0 waits at 127.0.0.1:") and "all 2 of WORLD_SIZE=2" in said
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    ended_at_last.cancel()
    assert process.returncode == -signal.SIGINT


def test_sharding_asked_of_a_single_process_is_noted(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings = Settings.model_validate({"run_dir": "r", "data": {"source": "s"}, "model": {"name": "m"}})
    assert rendezvous.join_processes(settings) is False
    assert "ACCELERATE_USE_FSDP=true has no effect on a single process" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_what_accelerate_offers_and_kestrel_does_not_use_is_refused(name, monkeypatch):
    """The Trainer would look for a package, and its error would name none that exists."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    settings = Settings.model_validate({"run_dir": "r", "data": {"source": "s"}, "model": {"name": "m"}})
    with pytest.raises(KestrelError, match=f"ACCELERATE_USE_{name}=true asks for what Kestrel does not use"):
        rendezvous.join_processes(settings)
