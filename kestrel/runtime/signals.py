"""SIGINT and SIGTERM at any moment, and standard output that nobody reads any more."""

from __future__ import annotations

import io
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from kestrel.errors import Interrupted
from kestrel.runtime.atomic import remove_unfinished
from kestrel.runtime.distributed import failure_to_report
from kestrel.runtime.run_folder import release_locks

INTERRUPTED = "interrupted; run the same command again to continue"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write_to_stderr(text: str) -> None:
    """Writes a line, also from within a signal handler, where print fails if the signal came during a print."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def exit_now(number: int, frame: object = None, message: str = INTERRUPTED) -> NoReturn:
    """Signal handler that ends the process with status 128 + number, without running the rest of the program.

    Not by an exception: Python ignores those raised in finalizers, libraries (matplotlib 3.11) turn them into errors of
    their own, and an import that is initializing C++ aborts.
    """
    with suppress(Exception):
        sys.stdout.flush()
    remove_unfinished()
    release_locks()
    if text := failure_to_report(message):
        write_to_stderr(text)
    os._exit(128 + number)


def raise_interrupted(number: int, frame: object = None) -> None:
    """Signal handler for code that catches `Interrupted`."""
    raise Interrupted(number, INTERRUPTED)


@contextmanager
def on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handles SIGINT and SIGTERM while the block runs, in the main thread.

    A signal that the process was started to ignore, as shells do with SIGINT for background jobs, stays ignored.
    """
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number in _SIGNALS if previous[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


class _Pipe(io.FileIO):
    """A pipe that discards what is written after its reader has closed it (`train.py | head`)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def prepare_output() -> None:
    """Keeps a run alive when the reader of its output closes the pipe, and on a terminal that is not UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        with suppress(OSError, ValueError):  # a stream that is closed
            mode = os.fstat(stream.fileno()).st_mode
            if stream is getattr(sys, f"__{name}__") and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                stream.flush()
                raw = _Pipe(stream.fileno(), "w", closefd=False)
                buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
                stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, **buffering)
                setattr(sys, name, stream)
        stream.reconfigure(errors="replace")
