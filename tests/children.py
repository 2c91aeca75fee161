"""Child processes that tests start, kill, and give a small disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_LIMIT = 900  # seconds; less than a test has
WAIT = "print('now', flush=True); time.sleep(60)\n"


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python in a process of its own, at the repository's root."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, text=True, **pipes
    )


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same until it ends; what takes too long is ended, and the last of its errors says where each thread was."""
    process = start(*arguments, PYTHONFAULTHANDLER="1", **environment)
    try:
        said = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        said = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts Python that prints a line when it is where it shall be killed."""
    header = "import os, sys, time; from pathlib import Path; from kestrel.runtime.atomic import *; from kestrel.runtime.manifest import *; from kestrel.runtime.run_folder import *\n"
    process = start("-c", header + code, *arguments)
    assert process.stdout is not None and process.stdout.readline().strip() == "now"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if os.geteuid() != 0 or done is None or done.returncode != 0:
        pytest.skip("a small disk cannot be mounted here: that needs root and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
