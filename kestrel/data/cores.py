"""Work spread over the cores of this machine, where there is enough of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from kestrel.errors import KestrelError

WORTH_IT = 8 * 2**20  # bytes; with fewer, one core is through within seconds
_MOST = 8  # more only wait for the process that hands them work
_AHEAD = 2  # pieces of work for each process that are handed out before the oldest one is back
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
Item = TypeVar("Item")
Result = TypeVar("Result")


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

    Each process has a pipe of its own and one item at a time: whenever one is killed, its pipe ends and nobody waits for
    it. The library's pools share their queues, and one that dies as it writes leaves the others waiting for ever.

    Args:
        function: anything that can be called, as the processes are forked here; what it changes stays in them.
        items: taken in this process. They and the results are pickled.
        processes: 1: this process calls the function itself.

    Raises:
        KestrelError: one of the processes is gone. Besides, whatever the function raises.
    """
    helpers = _Helpers(function, processes if processes > 1 else 0)
    try:
        yield from helpers.results(iter(items)) if helpers.free else map(function, items)
    finally:
        helpers.end()


class _Helpers:
    """Processes that call a function, and what they are at.

    Args:
        function: as for `in_order`.
        count: how many; fewer where the system starts no more.
    """

    def __init__(self, function: Callable[[Any], Any], count: int):
        self._started: list[tuple[BaseProcess, Connection]] = []
        self._at_work: dict[Connection, int] = {}  # the number of the item
        context = get_context("fork")
        with suppress(OSError), _signals_wait():
            for _ in range(count):
                ours, theirs = Pipe()
                process = context.Process(target=_help, args=(function, theirs, os.getpid()), daemon=True)
                process.start()
                theirs.close()  # now the pipe ends with the process
                self._started.append((process, ours))
        self.free = [ours for _, ours in self._started]

    def results(self, items: Iterator[Any]) -> Iterator[Any]:
        """Of all items, in their order."""
        ready: deque[Any] = deque()
        done: dict[int, Any] = {}
        given = told = 0
        exhausted = False
        while True:
            while self.free and ready:
                self._give(given, ready.popleft())
                given += 1
            if told in done:
                yield done.pop(told)
                told += 1
            elif not exhausted and given + len(ready) - told < _AHEAD * len(self._started):
                # Taken while the others work, so that who comes back need not wait for it.
                try:
                    ready.append(next(items))
                except StopIteration:
                    exhausted = True
            elif not self._at_work:
                return
            else:
                done.update(self._come_back(None))
                continue
            done.update(self._come_back(0))

    def end(self) -> None:
        """Ends all of them, whatever they are at."""
        for process, ours in self._started:
            process.kill()
            process.join()
            ours.close()

    def _give(self, number: int, item: Any) -> None:
        helper = self.free.pop()
        with _told_if_gone():
            helper.send(item)
        self._at_work[helper] = number

    def _come_back(self, patience: float | None) -> Iterator[tuple[int, Any]]:
        for helper in wait(list(self._at_work), patience):
            assert isinstance(helper, Connection)
            with _told_if_gone():
                returned, result = helper.recv()
            if not returned:
                raise result
            self.free.append(helper)
            yield self._at_work.pop(helper), result


@contextmanager
def _told_if_gone() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise KestrelError(
            "a process that helped was killed, as systems do when memory runs out; give this one fewer cores, "
            "with `taskset -c 0` in front of the command, say"
        ) from None


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Until the processes that are forked meanwhile have begun, a signal is not for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _help(function: Callable[[Any], Any], pipe: Connection, parent: int) -> None:
    """What a process does. Ctrl-C is the parent's matter, which then sends everyone home."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads are not here
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    while True:
        item = pipe.recv()
        try:
            result = True, function(item)
        except Exception as error:  # noqa: BLE001  the parent raises it
            error.add_note(traceback.format_exc())
            result = False, error
        pipe.send(result)


def _leave_with(parent: int) -> None:
    """Ends this process when the one that forked it is gone, which may have had no time to say so."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
