"""Several processes of one run, started by the launchers that people use."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, "-m", "torch.distributed.run"]
TORCHRUN = [*RUN, "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
PATIENCE = 240  # seconds; a run takes 15 on two idle cores, and nothing here may hang


def begin(*command: str, launcher: list[str] = TORCHRUN, cwd: Path = ROOT) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launcher, *command], cwd=cwd, text=True, **pipes)


def end(*launched: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The greatest exit status of launchers of one run, and what they and their processes said."""
    said = [process.communicate(timeout=PATIENCE) for process in launched]
    return max(process.returncode for process in launched), *("".join(each) for each in zip(*said, strict=True))


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
