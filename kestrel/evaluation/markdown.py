"""Text that stays text in Markdown, and tables of it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def escape(text: str) -> str:
    """For a paragraph, an item, a quotation or a table's cell: shown as it is, on one line."""
    text = " ".join(html.escape(text, quote=False).split())
    text = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return re.sub(r"^(\d*)([-+#.)=])", r"\1\\\2", text)  # what at a line's beginning makes a list or a heading


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """A table of text; `align` is that of all columns but the first."""
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in (columns, *rows)]
    lines.insert(1, "| " + " | ".join(["---", *[align] * (len(columns) - 1)]) + " |")
    return "\n".join(lines)
