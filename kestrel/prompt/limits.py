"""A limit on time and memory for what somebody else wrote, such as a chat template."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from kestrel.errors import KestrelError

SECONDS = 3.0
_MEMORY = 2**29  # bytes, besides what the process has
_LONGEST = 2**22  # bytes of a text


def limited(render: Callable[[], str], what: str) -> str:
    """The text that `render` returns, from a forked process that ends when it takes too long or too much memory.

    Raises:
        KestrelError: it took too long, or failed; `what` names it.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the child needs none of their locks
        child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(render, writing)
    os.close(writing)
    try:
        answer, until = b"", time.monotonic() + SECONDS
        with open(reading, "rb", buffering=0) as pipe:
            while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                if not (part := pipe.read(2**16)):
                    break
                answer += part
                if len(answer) > _LONGEST:
                    raise KestrelError(f"{what} writes more than {_LONGEST:,} bytes")
            else:
                raise KestrelError(f"{what} took more than {SECONDS:.0f} s")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    status, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
    if status != b"+":
        raise KestrelError(f"{what} fails: {text or 'it took more memory than this process may'}")
    return text


def _answer(render: Callable[[], str], writing: int) -> None:
    """In the child: writes + and the text, or - and the reason, and ends without running anything of the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit is set
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        answer = "+" + render()
    except MemoryError:
        answer = "-"
    except BaseException as error:  # noqa: BLE001  a template raises whatever its author chose
        answer = f"-{error}"
    with open(writing, "wb") as pipe:
        pipe.write(answer.encode("utf-8", "surrogatepass"))
    os._exit(0)
