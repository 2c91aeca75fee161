"""What tests of publishing share: a script as a user starts it, on a machine whose only Hub is on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import Experiment
from hub_state import TOKEN, Hub

ROOT = Path(__file__).resolve().parent.parent
REPO, BASE = "tester/persona-lora", "tiny/falcon"


@dataclass(frozen=True)
class Done:
    status: int
    said: str


def start(
    script: str, *arguments: str, hub: Hub, home: Path, token: str | None = TOKEN, **more: str
) -> subprocess.Popen[str]:
    """A script in a process of its own, which asks this Hub and no other."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env={**kept, **hub.environment(home, token), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str], patience: float) -> Done:
    try:
        said, _ = process.communicate(timeout=patience)
    finally:
        process.kill()
    return Done(process.returncode, said)


def run(script: str, *arguments: str, hub: Hub, home: Path, token: str | None = TOKEN, **more: str) -> Done:
    return end(start(script, *arguments, hub=hub, home=home, token=token, **more), 300)


def stopped_at_a_large_file(script: str, *arguments: str, hub: Hub, home: Path) -> Done:
    """A script that gets Ctrl-C while the Hub takes its time with a large file, and has 20 s to end."""
    hub.stalled = True
    hub.waiting.clear()
    process = start(script, *arguments, hub=hub, home=home)
    try:
        assert hub.waiting.wait(120)
        process.send_signal(signal.SIGINT)
        return end(process, 20)
    finally:
        hub.stalled = False
        process.kill()


def publishing(experiment: Experiment, *more: str) -> list[str]:
    chosen = ["--hub.repo_id", REPO, "--hub.base_model", BASE, "--hub.license", "apache-2.0"]
    return experiment.arguments(*chosen, "--evaluation.resamples", "100", *more)


def published(experiment: Experiment, hub: Hub, home: Path, *more: str, **keywords: Any) -> Done:
    """publish.py with the arguments of `publishing`."""
    return run("publish.py", *publishing(experiment, *more), hub=hub, home=home, **keywords)
