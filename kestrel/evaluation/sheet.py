"""A blind sheet on which people, or any tool, compare two systems' replies.

Each context has two replies, in an order and on sides that the seed decides. Which system is on which side stands in
key.json alone. `judgements` reads what comes back.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.report import environment, page_parts
from kestrel.evaluation.scoring import Evaluation
from kestrel.runtime.atomic import folder_atomically, read_json, write_json
from kestrel.runtime.manifest import sha256_of_json

_COLUMNS = ("sheet", "item", "persona", "history", "left", "right", "choice", "judge")


def write_sheet(folder: Path, evaluation: Evaluation, count: int, seed: int) -> str:
    """Writes sheet.html, sheet.csv and key.json. Returns a sentence about it.

    The replies are drawn from those in which the first two systems differ.

    Raises:
        KestrelError: fewer than two systems, no reply in which they differ, or a folder with another sheet.
    """
    systems = evaluation.of_kind("system", "base")[:2]
    if len(systems) < 2:
        raise KestrelError(
            "evaluation.sheet compares two systems, and only one is scored; name another file of replies"
        )
    draw = random.Random(seed)
    pairs = list(zip(*(evaluation.systems[name].replies for name in systems), strict=True))
    differing = [i for i, (one, two) in enumerate(pairs) if one.response.strip() != two.response.strip()]
    if not differing:
        raise KestrelError(f"evaluation.sheet: {systems[0]} and {systems[1]} answer everything alike")
    items, places = [], {}
    for number, i in enumerate(draw.sample(differing, min(count, len(differing))), start=1):
        first = draw.randrange(2)
        context = evaluation.systems["gold"].replies[i]
        items.append(_item(f"{number}", context, pairs[i][first].response, pairs[i][1 - first].response))
        places[f"{number}"] = {"dialogue_id": context.dialogue_id, "turn": context.turn, "left": systems[first]}
    key: dict[str, Any] = {"sheet": sha256_of_json(items)[:16], "systems": systems, "items": places}
    if (folder / "key.json").exists():
        if read_json(folder / "key.json", "delete it")["sheet"] != key["sheet"]:
            raise KestrelError(
                f"{folder} has a sheet of other replies, which judgements may refer to; move it away, or leave out "
                "evaluation.sheet"
            )
        return f"{folder}/sheet.html is as it was"
    with folder_atomically(folder) as unfinished:
        (unfinished / "sheet.html").write_text(_as_html(key["sheet"], items), encoding="utf-8")
        (unfinished / "sheet.csv").write_text(_as_csv(key["sheet"], items), encoding="utf-8", newline="")
        write_json(unfinished / "key.json", key)
    return f"{folder}/sheet.html shows {len(items)} pairs of replies; key.json beside it says whose they are"


def _item(number: str, context: Reply, left: str, right: str) -> dict[str, Any]:
    history = [{"speaker": turn.speaker, "text": turn.text} for turn in context.history or ()]
    return {"item": number, "persona": list(context.persona or ()), "history": history, "left": left, "right": right}


def _as_html(sheet: str, items: Sequence[Mapping[str, Any]]) -> str:
    template = environment("sheet.html.j2").get_template("sheet.html.j2")
    return template.render(sheet=sheet, items=items, **page_parts("sheet.js"))


def _as_csv(sheet: str, items: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS)
    writer.writeheader()
    for item in items:
        history = "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in item["history"])
        texts = {**item, "sheet": sheet, "persona": "\n".join(item["persona"]), "history": history}
        writer.writerow({column: _as_text(text) for column, text in texts.items()})
    return out.getvalue()


def _as_text(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: https://owasp.org/www-community/attacks/CSV_Injection"""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
