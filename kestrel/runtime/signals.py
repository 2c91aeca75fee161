"""A script's process: told to stop at any moment, and writing to a reader that may have gone."""

from __future__ import annotations

import io
import os
import signal
import stat
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kestrel.errors import Interrupted
from kestrel.runtime.distributed import is_first

_AGAIN = "interrupted; run the same command again to go on"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def tell(text: str) -> None:
    """Writes a line to standard error, from within a signal's handler: print fails if the signal came during a print."""
    if is_first():
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Ends the script by an exception, except while it imports: C++ that is being initialized would abort on one."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            tell(_AGAIN)
            os._exit(128 + number)
        frame = frame.f_back
    raise Interrupted(number, _AGAIN)


class _Swallowed:
    """Sends a signal again whose `Interrupted` went nowhere.

    Python calls finalizers, and the callbacks of weak references, between any two instructions, and goes on after an
    exception in one of them.

    Attributes:
        number: of a signal that was swallowed and has not come again yet.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._timer: threading.Timer | None = None
        self._former = sys.unraisablehook
        sys.unraisablehook = self._hook

    def _hook(self, what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Interrupted):
            self._former(what)
            return
        self.number = what.exc_value.exit_status - 128
        self._timer = threading.Timer(0.05, os.kill, (os.getpid(), self.number))  # when the finalizer is over
        self._timer.start()

    def close(self) -> None:
        """Sends nothing any longer: nobody would handle it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        sys.unraisablehook = self._former


@contextmanager
def on_signals(handler: Callable[[int, Any], None] | None = None) -> Iterator[None]:
    """Handles SIGINT and SIGTERM while the block runs; without a handler they end it with `Interrupted`.

    A signal that the process was started to ignore, as shells do with SIGINT for jobs in the background, stays ignored.
    """
    received: list[int] = []
    swallowed = _Swallowed()

    def stop(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        swallowed.number = None
        _interrupt(number, frame)

    former = {number: signal.getsignal(number) for number in _SIGNALS}
    mine = [number for number in _SIGNALS if former[number] is not signal.SIG_IGN]
    for number in mine:
        signal.signal(number, handler or stop)
    try:
        yield
        if swallowed.number is not None:  # too late to come again
            raise Interrupted(swallowed.number, _AGAIN)
    except Exception as error:
        if received:  # C in between (matplotlib 3.11) made an error of its own of it
            raise Interrupted(received[0], _AGAIN) from error
        raise
    finally:
        swallowed.close()
        for number in mine:
            signal.signal(number, former[number])


class _Abandoned(io.FileIO):
    """A pipe into which writing goes on, to nowhere, when its reader has gone (`train.py | head`)."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def prepare_output() -> None:
    """Lets a run survive that nobody reads its output any longer, and a terminal that is not UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is getattr(sys, f"__{name}__") and _is_pipe(stream):
            stream.flush()
            raw = _Abandoned(stream.fileno(), "w", closefd=False)
            at_once = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, **at_once)
            setattr(sys, name, stream)
        stream.reconfigure(errors="replace")


def _is_pipe(stream: io.TextIOWrapper) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
