"""What the command lines of the benchmarks share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

DIALOGUES = str(Path(__file__).resolve().parent.parent / "quickstart" / "dialogues")


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it stands, with the option that every benchmark of dialogues has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", default=DIALOGUES, help="dialogues in any form that preprocess.py reads (the quickstart's)"
    )
    return parser


def at_least_one(text: str) -> int:
    """The type of an option that says how many.

    Raises:
        ArgumentTypeError: not an integer of at least one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number, 1 or more, found {text!r}")
    return int(text)


def told(work: Callable[[], int]) -> int:
    """The exit status of a benchmark: what `work` returns, or an error that is said in one line."""
    from kestrel.errors import KestrelError

    try:
        return work()
    except KestrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
