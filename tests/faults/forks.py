"""Runs of the scripts in processes of their own that can be killed at any moment and cost no imports.

Importing torch and transformers takes longer than a tiny run. So this process imports everything once and forks for
each run; the child calls the script's main(argv) and is killed for real, with its whole process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import script
from tqdm import tqdm

from kestrel.runtime.manifest import git_commit

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("preprocess", "train", "generate", "evaluate", "publish", "chat")
_LIMIT = 120.0  # seconds; what takes longer hangs
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Moment:
    """When a run is sent a signal."""

    number: int = signal.SIGKILL
    seconds: float | None = None  # after its start
    operation: int | None = None  # instead: just before its nth operation on files of the run folder; from 1
    again: float | None = None  # seconds after which the same signal is sent a second time
    change: int | None = None  # instead of a signal: the nth change of files in the run folder fails
    error: int = 0  # with this error
    stays: bool = False  # and so do all later ones


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    status: int  # exit status; minus the signal's number if a signal ended it
    seconds: float
    seconds_to_stop: float  # from the first signal to the end; 0.0 without one
    operations: int | None  # as `Moment.operation` counts them; None for a run that was killed
    changes: int | None  # as `Moment.change` counts them, if disk.c is loaded
    said: str  # standard output and error


class Forks:
    """Starts scripts by forking this process, which must not start threads; their output goes to the folder `work`.

    What is typed into a script is in the file `typed` there.
    """

    def __init__(self, work: Path):
        self._work, self.typed = work, work / "typed.txt"
        self._scripts = {name: script(name) for name in SCRIPTS}
        git_commit()  # which forks then know
        # tqdm's own lock is a semaphore that all forks share: one that is killed with it would stop the others. Its
        # monitor is a thread, which may hold the lock at the moment of a fork.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor_interval = 0
        faulthandler.register(signal.SIGUSR1, file=2)  # in forks too: what hangs says where

    def run(self, name: str, arguments: list[str], watched: Path, moment: Moment | None = None) -> Ended:
        """Runs a script to its end, which `moment` may cause; counts the file operations in the folder `watched`."""
        log, report = self._work / "output.txt", self._work / "report.txt"
        log.unlink(missing_ok=True)
        report.unlink(missing_ok=True)
        began = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not for the copy of this process
        pid = os.fork()
        if not pid:
            self._child(name, arguments, watched, moment, log, report)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        sent = self._send(pid, moment, began)
        hung = _alive_until(pid, time.monotonic() + _LIMIT)
        if hung:
            os.kill(pid, signal.SIGUSR1)  # see __init__
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        ended = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # whatever it had started itself
            os.killpg(pid, signal.SIGKILL)
        lines = report.read_text(encoding="utf-8").split() if report.exists() else []
        for module in lines[2:]:
            with contextlib.suppress(Exception):  # some are made by others and cannot be imported alone
                importlib.import_module(module)
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if hung:
            raise TimeoutError(f"{name}.py does not end after {moment}:\n{said}")
        return Ended(
            os.waitstatus_to_exitcode(status),
            ended - began,
            ended - sent if sent else 0.0,
            int(lines[0]) if lines else None,
            int(lines[1]) if lines else None,
            said,
        )

    def _send(self, pid: int, moment: Moment | None, began: float) -> float | None:
        """Sends the signals of a moment that is a time. Returns when the first one was sent."""
        if moment is None or moment.seconds is None:
            return None
        if not _alive_until(pid, began + moment.seconds):
            return None
        sent = time.monotonic()
        send: Callable[[int, int], None] = os.killpg if moment.number == signal.SIGKILL else os.kill
        with contextlib.suppress(ProcessLookupError):
            send(pid, moment.number)
            if moment.again is not None and _alive_until(pid, sent + moment.again):
                os.kill(pid, moment.number)
        return sent

    def _child(
        self, name: str, arguments: list[str], watched: Path, moment: Moment | None, log: Path, report: Path
    ) -> None:
        status = 99
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the moment before run_script handles it is no trial's
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(self.typed, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(ROOT)
            known = set(sys.modules)
            count = _count_operations(watched, moment.operation if moment else None)
            changes = _break_disk(watched, moment or Moment())
            try:
                status = self._scripts[name].main(arguments)
            except SystemExit as exit:
                status = int(exit.code or 0)
            sys.stdout.flush()
            new = [module for module in sys.modules if module not in known and "<" not in module]
            report.write_text("\n".join([str(count()), str(changes()), *new]), encoding="utf-8")
        except BaseException:  # noqa: BLE001  a fork must never return into its parent's work
            traceback.print_exc()
        finally:
            os._exit(status)


def _alive_until(pid: int, moment: float) -> bool:
    """Waits, and returns False as soon as the process has ended; it is left to be waited for."""
    while (left := moment - time.monotonic()) > 0:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(min(left, 0.005))
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _break_disk(watched: Path, moment: Moment) -> Callable[[], int]:
    """Counts what disk.c counts, 0 if it is not loaded, and lets the disk fail at that moment."""
    if "LD_PRELOAD" not in os.environ:
        return lambda: 0
    disk = ctypes.CDLL(None)
    disk.kestrel_fail_at(os.fsencode(watched) + b"/", moment.change or 0, moment.error, int(moment.stays))
    return lambda: int(disk.kestrel_changes())


def _count_operations(watched: Path, last: int | None) -> Callable[[], int]:
    """Counts Python's operations that change a folder from now on, and kills this process before the `last`th."""
    count, prefix = 0, str(watched)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in _OPERATIONS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)
        if not changes or not isinstance(arguments[0], str | os.PathLike) or not str(arguments[0]).startswith(prefix):
            return
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count
