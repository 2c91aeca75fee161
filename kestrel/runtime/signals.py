"""SIGINT and SIGTERM at any moment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from kestrel.errors import Interrupted
from kestrel.runtime.atomic import remove_unfinished
from kestrel.runtime.distributed import failure_to_report
from kestrel.runtime.output import write_to_stderr
from kestrel.runtime.run_folder import release_locks

INTERRUPTED = "interrupted; run the same command again to continue"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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


def ignore_signal(number: int, frame: object = None) -> None:
    """Signal handler while a process that is ending anyway says why."""


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
