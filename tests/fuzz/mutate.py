"""Changes that leave JSON and lines what they are, so that a fuzzer gets past the parser."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Values that readers of other people's JSON trip over.
_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 1e308, float("nan"), float("inf"), "", " ", "\n", "\u2028", "\x00", "\ud800",
    "a" * 300, "../../x", "{{ 7*7 }}", "<script>", "\x1b[2J", [], {}, [[]], {"": None}, [None], "1", "self", "partner",
]  # fmt: skip


def mutate(data: bytes, limit: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """Another input, near to `data`.

    Args:
        data: any bytes.
        limit: bytes that the result may have.
        seed: of what is changed.
        mutate_bytes: the fuzzer's own mutation: (bytes, limit) -> bytes.
    """
    if random.Random(seed).random() < 0.3 and b"\n" in data:
        return _mutate_lines(data, limit, random.Random(seed + 1), mutate_bytes)
    return _mutate_json(data, limit, seed, mutate_bytes)


def _mutate_lines(data: bytes, limit: int, draw: random.Random, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """Lines doubled, moved, left out, joined, or one of them changed."""
    lines = data.split(b"\n")
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        kind = draw.randrange(5)
        if kind == 0:
            lines.insert(at, lines[other])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3 and len(lines) > 1:
            lines[at] += lines[other]
        else:
            lines[at] = mutate_bytes(lines[at], len(lines[at]) + 20)
    return b"\n".join(lines)[:limit]


def _mutate_json(data: bytes, limit: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """One JSON value of a JSON file, or one line's of a JSON lines file, changed in a place or some.

    Where there is none, and now and then besides, `mutate_bytes` has it.
    """
    draw = random.Random(seed)
    lines = [data] if draw.random() < 0.5 else data.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except (ValueError, RecursionError):
        return mutate_bytes(data, limit)
    if draw.random() < 0.15:
        return mutate_bytes(data, limit)
    try:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            value = _changed(value, draw, mutate_bytes)
        lines[at] = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a whole number of too many digits
        return mutate_bytes(data, limit)
    if len(lines) > 1 and draw.random() < 0.2:
        lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return b"\n".join(lines)[:limit]


def _changed(value: Any, draw: random.Random, mutate_bytes: Callable[[bytes, int], bytes]) -> Any:
    """`value` with one node replaced, removed, doubled or moved; containers are changed in place."""
    places: list[tuple[Any, Any]] = []  # container, key or index

    def collect(node: Any, depth: int) -> None:
        if depth < 20:
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                collect(node[key], depth + 1)

    collect(value, 0)
    if not places:
        return copy.deepcopy(draw.choice(_ODD))
    container, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        container[key] = copy.deepcopy(draw.choice(_ODD))
    elif kind == 1:
        del container[key]
    elif kind == 2 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 3:
        other, name = draw.choice(places)
        container[key] = copy.deepcopy(other[name])
    elif kind == 4 and isinstance(container, dict):
        container[draw.choice([*container, "extra"])] = container.pop(key)
    else:
        old = container[key]
        if isinstance(old, str):
            raw = mutate_bytes(old.encode("utf-8", "surrogatepass"), len(old) + 40)
            container[key] = raw.decode("utf-8", "replace")
        elif isinstance(old, int | float) and not isinstance(old, bool):
            container[key] = draw.choice((-old, old + 1, old - 1, old * 2, float(old), str(old)))
        else:
            container[key] = copy.deepcopy(draw.choice(_ODD))
    return value
