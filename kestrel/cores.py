"""Work spread over the cores of this machine, where there is enough of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from kestrel.errors import KestrelError

WORTH_IT = 8 * 2**20  # bytes; with fewer, one core is through within seconds
_MOST = 8  # more only wait for the process that hands them work
_AHEAD = 2  # pieces of work for each process that are handed out before the oldest one is back
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # in a process that was forked for it: what it calls


def processes_for(files: Sequence[Path]) -> int:
    """How many processes the reading of some files is worth: one, or as many as there are cores to use, up to 8.

    Cores are those that the system lets this process run on; `taskset` and batch systems set them.
    """
    if sys.platform != "linux":  # where libraries survive a fork
        return 1
    size = sum(file.stat().st_size for file in files)
    return min(len(os.sched_getaffinity(0)), _MOST) if size >= WORTH_IT else 1


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """function(item) of each item, in the order of the items, a few of which are taken ahead.

    Args:
        function: anything that can be called, as the processes are forked here; what it changes stays in them.
        items: taken in this process. They and the results are pickled.
        processes: 1: this process calls the function itself.

    Raises:
        KestrelError: one of the processes is gone. Besides, whatever the function raises.
    """
    pool = _pool(function, processes) if processes > 1 else None
    if pool is None:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    left = iter(items)
    try:
        while True:
            for item in islice(left, processes * _AHEAD - len(pending)):
                with _signals_wait():
                    pending.append(pool.submit(_call, item))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise KestrelError(
            "a process that helped was killed, as systems do when memory runs out; give this one fewer cores, "
            "with `taskset -c 0` in front of the command, say"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(function: Callable[[Any], Any], processes: int) -> ProcessPoolExecutor | None:
    """None where the system has no semaphores to give, as in containers without /dev/shm."""
    with suppress(ImportError, NotImplementedError, OSError):
        told = function, os.getpid()
        return ProcessPoolExecutor(processes, get_context("fork"), initializer=_begin, initargs=told)
    return None


@contextmanager
def _signals_wait() -> Iterator[None]:
    """The first piece of work forks the processes, and until they have begun, a signal is not for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """What a process does first. Ctrl-C is the parent's matter, which then sends everyone home."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads are not here
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """Ends this process when the one that forked it is gone, which may have had no time to say so."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
