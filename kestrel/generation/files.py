"""Other orders of a persona's sentences, to see how far a model's answers depend on the one that was given."""

from __future__ import annotations

import re

_NAME = re.compile(r"(?P<system>.+)-order(?P<order>[1-9][0-9]*)", re.DOTALL)


def name_in_order(system: str, order: int) -> str:
    """What a system is called in the name of its file: SYSTEM, or SYSTEM-orderK."""
    return f"{system}-order{order}" if order else system


def order_in_name(name: str) -> tuple[str, int]:
    """The opposite of `name_in_order`: system and order."""
    found = _NAME.fullmatch(name)
    return (found["system"], int(found["order"])) if found else (name, 0)
