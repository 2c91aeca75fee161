"""Standard output and standard error: no text can steer the terminal, and a reader that is gone ends no run."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# C0 and C1 controls except line break and tab, line separators, bidirectional embeddings, overrides and isolates, halves
# of surrogate pairs. Joiners and marks that many scripts need are not among them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with its control characters as `\\x1b` or `\\u202e`, which no terminal acts on."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_visible(line: str) -> str:
    """JSON that means the same, with control characters in its strings as `\\u009b`, for files that people watch."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def steer(sequence: str) -> None:
    """Writes a control sequence of our own to standard output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        io.TextIOWrapper.write(sys.stdout, sequence)


def print_marked(text: str, is_alarming: bool) -> None:
    """Prints a line, in red on a terminal where it is alarming."""
    in_color = is_alarming and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    steer("\033[31m" if in_color else "")
    print(text, end="")
    steer("\033[0m" if in_color else "")
    print()


def write_to_stderr(text: str) -> None:
    """Writes a line, also from within a signal handler, where print fails if the signal came during a print."""
    with suppress(OSError):
        os.write(2, f"{visible(text)}\n".encode(errors="replace"))


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
    """Makes whatever is printed visible, also by libraries; keeps a run alive when the reader of its output closes the
    pipe, and on a terminal that is not UTF-8."""
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
        if "write" not in vars(stream):
            vars(stream)["write"] = _filtered(stream, keeps_bars=name == "stderr")


def _filtered(stream: io.TextIOWrapper, keeps_bars: bool) -> Callable[[str], int]:
    """The stream's `write`, for visible text. Progress bars begin with a carriage return, or only move the cursor up."""
    write = type(stream).write

    def write_visible(text: str) -> int:
        bar = re.match("\r|(\x1b\\[A)+$", text) if keeps_bars else None
        start = bar[0] if bar else ""
        return write(stream, start + visible(text[len(start) :]))

    return write_visible
