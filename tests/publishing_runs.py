"""What tests of publishing share: a script as a user starts it, on a machine whose only Hub is on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import Experiment
from hub_server import TOKEN, Hub

ROOT = Path(__file__).resolve().parent.parent
REPO, BASE = "tester/persona-lora", "tiny/falcon"


@dataclass(frozen=True)
class Done:
    status: int
    said: str


def environment(hub: Hub, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {**kept, **hub.environment(home, token), **more}


def run(script: str, *arguments: str, hub: Hub, home: Path, token: str | None = TOKEN, **more: str) -> Done:
    """A script in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment(hub, home, token, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    return Done(done.returncode, done.stdout)


def stopped_at_a_large_file(script: str, *arguments: str, hub: Hub, home: Path) -> Done:
    """A script that gets Ctrl-C while the Hub takes its time with a large file, and has 20 s to end."""
    hub.stalled = True
    hub.waiting.clear()
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment(hub, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert hub.waiting.wait(120)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
    finally:
        hub.stalled = False
        process.kill()
    return Done(process.returncode, said)


def publishing(experiment: Experiment, *more: str) -> list[str]:
    chosen = ["--hub.repo_id", REPO, "--hub.base_model", BASE, "--hub.license", "apache-2.0"]
    return experiment.arguments(*chosen, "--evaluation.resamples", "100", *more)
