"""Generated blocks of the documentation, and Markdown tables to put in them.

A block begins with `<!-- NAME: made by COMMAND -->` and ends with `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def filled(text: str, blocks: dict[str, str]) -> str:
    """The text with the content of the named blocks replaced.

    Raises:
        SystemExit: the text does not have exactly one block of a name.
    """
    for name, content in blocks.items():
        before, found, rest = _split(text, rf"<!-- {re.escape(name)}: made by [^\n]*-->\n")
        _, end, after = _split(rest, "<!-- end -->")
        if not found or not end or f"<!-- {name}: made by " in after:
            raise SystemExit(f"expected one block named {name}")
        text = f"{before}{found}{content}\n{end}{after}"
    return text


def _split(text: str, pattern: str) -> tuple[str, str, str]:
    match = re.search(pattern, text)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


def fill_page(name: str, blocks: dict[str, str]) -> None:
    """Replaces blocks of the page at this path within the repository."""
    page = ROOT / name
    page.write_text(filled(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = False) -> str:
    """A Markdown table; `numeric` aligns all columns but the first to the right."""
    rule = ["---"] + ["---:" if numeric else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
