"""What the command lines of the benchmarks share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_DIALOGUES = str(Path(__file__).resolve().parent.parent / "quickstart" / "dialogues")


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it stands, with the option that every benchmark of dialogues has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", default=_DIALOGUES, help="dialogues in any form that preprocess.py reads (the quickstart's)"
    )
    return parser


def command_of(name: str, argv: Sequence[str] | None) -> str:
    """A benchmark's command as it was typed, for the record, without the places of one machine.

    Args:
        name: of the script.
        argv: its arguments; None: those of the process.
    """
    words = [f"python benchmarks/{name}"]
    instead = {"--model": "FOLDER", "--tokenizer": "FOLDER", "--text": "FILE", "--output": "", "--work": ""}
    instead["--unsloth"] = "FOLDER"
    given = iter(sys.argv[1:] if argv is None else argv)
    for word in given:
        option, joined, _ = word.partition("=")
        if option not in instead:
            words.append(word)
            continue
        if instead[option]:
            words += [option, instead[option]]
        if not joined:
            next(given, None)
    return " ".join(words)


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
