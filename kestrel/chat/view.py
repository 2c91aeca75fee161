"""How answers look in a terminal, and paths as people type them."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from kestrel.chat.conversation import Exchange, System
from kestrel.runtime.output import steer, visible


class Line:
    """An answer that grows after the name of its system."""

    def __init__(self, system: System):
        self._length = 0
        print(f"{system}> ", end="", flush=True)

    def show(self, exchange: Exchange, is_whole: bool = False) -> None:
        more, self._length = exchange.reply[self._length :], len(exchange.reply)
        print(visible(more), end="\n" if is_whole else "", flush=True)


class Columns:
    """Answers that grow side by side, drawn over each time; without a terminal they are printed once, at the end."""

    def __init__(self, systems: Sequence[System]):
        self._systems, self._rows = systems, 0

    def show(self, exchange: Exchange, is_whole: bool = False) -> None:
        placeholder = "(empty)" if is_whole else "…"
        block = side_by_side({system: exchange.replies.get(system) or placeholder for system in self._systems})
        rows = block.count("\n") + 1
        # What has scrolled out of sight cannot be drawn over.
        if is_whole or (sys.stdout.isatty() and rows < shutil.get_terminal_size().lines):
            if self._rows:
                steer(f"\x1b[{self._rows}F\x1b[J")
            print(block, flush=True)
            self._rows = rows


def typed_path(text: str) -> Path:
    """A path as people type it: perhaps in quotation marks, or with ~ for their home."""
    return Path(os.path.expanduser(unquoted(text)))  # Path.expanduser raises if the user is unknown


def unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def side_by_side(answers: dict[System, str]) -> str:
    """Answers in columns as wide as the terminal allows, each below its system's name."""
    width = max(20, (shutil.get_terminal_size().columns - 3 * (len(answers) - 1)) // len(answers))
    columns = [[f"{system}>", *textwrap.wrap(visible(text), width)] for system, text in answers.items()]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" │ ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
