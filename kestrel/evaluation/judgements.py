"""What people, or any tool, judged on the blind sheet of `sheet`: who is preferred, agreement, and which scores go with it.

A file is what the page saves, {"sheet", "judge", "choices": {item: choice}}, or the sheet's CSV with `choice` (left,
right or tie) and `judge` filled in.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kestrel.errors import KestrelError
from kestrel.evaluation.metric_table import METRICS
from kestrel.evaluation.resampling import Array
from kestrel.evaluation.scoring import Evaluation
from kestrel.evaluation.systems import statistics_of
from kestrel.runtime.atomic import open_regular, read_json

CHOICES = ("left", "right", "tie")
FEWEST_DIALOGUES = 6  # a sign test on fewer cannot be significant


def read_key(folder: Path) -> dict[str, Any]:
    """Which system is on which side of the sheet in a folder.

    Raises:
        KestrelError: the folder has no sheet.
    """
    if not (folder / "key.json").exists():
        raise KestrelError(
            f"evaluation.judgements needs {folder}/key.json, which evaluation.sheet writes with the sheet"
        )
    key = read_json(folder / "key.json", "it belongs to the sheet beside it; make both again")
    try:
        places = [(place["dialogue_id"], place["turn"], place["left"]) for place in key["items"].values()]
        if not key["sheet"] or len(key["systems"]) != 2 or not {left for *_, left in places} <= set(key["systems"]):
            raise ValueError("the systems do not fit the items")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise KestrelError(f"{folder}/key.json is damaged ({error!r}); make the sheet again") from None
    return dict(key)


Judgement = tuple[str, str, str]  # judge, item, choice


def read_judgements(paths: Sequence[Path], key: Mapping[str, Any]) -> list[Judgement]:
    """The judgements in files, JSON or CSV; rows of the CSV without a choice are not judged yet.

    Raises:
        KestrelError: naming the file and what it holds instead, or a judge who judges an item twice.
    """
    found: list[Judgement] = []
    first: dict[tuple[str, str], Path] = {}  # where a judge judges an item
    for path in paths:
        for judge, item, choice in _judgements_in(path, key):
            if (judge, item) in first:
                raise KestrelError(
                    f"evaluation.judgements: {path} has item {item} by {judge!r}, who judges it in {first[judge, item]} already; "
                    "name each file once, and give different judges different names"
                )
            first[judge, item] = path
            found.append((judge, item, choice))
    if not found:
        raise KestrelError(
            f"evaluation.judgements: {', '.join(map(str, paths))} has no choice yet; fill in left, right or tie"
        )
    return found


def _judgements_in(path: Path, key: Mapping[str, Any]) -> list[Judgement]:
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KestrelError(f"evaluation.judgements: {path} cannot be read ({error})") from error
    try:
        if path.suffix.lower() == ".csv":
            head = text.partition("\n")[0]
            delimiter = ";" if head.count(";") > head.count(",") else ","  # which a spreadsheet may have put instead
            rows = [row for row in csv.DictReader(io.StringIO(text), delimiter=delimiter) if row["choice"].strip()]
            sheets = {row["sheet"] for row in rows}
            found = [(row["judge"] or path.stem, row["item"], row["choice"].strip().lower()) for row in rows]
        else:
            saved = json.loads(text)
            sheets = {saved["sheet"]}
            found = [(saved["judge"] or path.stem, item, choice) for item, choice in saved["choices"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise KestrelError(
            f"evaluation.judgements: {path} is neither what the sheet's page saves nor its CSV ({error!r})"
        ) from None
    if sheets - {key["sheet"]}:
        raise KestrelError(
            f"evaluation.judgements: {path} is of another sheet ({sheets.pop()}) than key.json ({key['sheet']}); name "
            "files of this run's sheet"
        )
    for _, item, choice in found:
        if item not in key["items"]:
            raise KestrelError(f"evaluation.judgements: {path} judges item {item!r}, which the sheet does not have")
        if choice not in CHOICES:
            raise KestrelError(
                f"evaluation.judgements: {path}, item {item}: expected left, right or tie, found {choice!r}"
            )
    return [(str(judge).encode("utf-8", "replace").decode(), item, choice) for judge, item, choice in found]


def judged(evaluation: Evaluation, key: Mapping[str, Any], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What metrics.json says of the judgements.

    Returns:
        systems, judges, items, wins by system, ties; alpha: Krippendorff's, nominal, None where nobody judged the same
        item or all chose alike; dialogues won by system and the p-value of a two-sided sign test over dialogues, None
        below `FEWEST_DIALOGUES`; and for each score of single replies Kendall's tau-b between its difference and
        the judges' preference.
    """
    one, two = key["systems"]
    votes: dict[str, list[int]] = defaultdict(list)  # +1 for the first system, by item
    for _, item, choice in judgements:
        left = 1 if key["items"][item]["left"] == one else -1
        votes[item].append({"left": left, "right": -left, "tie": 0}[choice])
    by_dialogue: Counter[str] = Counter()
    for item, values in votes.items():
        by_dialogue[key["items"][item]["dialogue_id"]] += sum(values)
    won = {one: sum(v > 0 for v in by_dialogue.values()), two: sum(v < 0 for v in by_dialogue.values())}
    every = [value for values in votes.values() for value in values]
    return {
        "sheet": key["sheet"],
        "systems": [one, two],
        "judges": sorted({judge for judge, _, _ in judgements}),
        "items": len(votes),
        "wins": {one: every.count(1), two: every.count(-1)},
        "ties": every.count(0),
        "alpha": _alpha(judgements),
        "dialogues_won": won,
        "p_value": sign_test(*won.values()) if sum(won.values()) >= FEWEST_DIALOGUES else None,
        "correlations": _correlations(evaluation, key, {item: float(np.mean(v)) for item, v in votes.items()}),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """The result of `judged` as a sentence."""
    one, two = found["systems"]
    wins, dialogues = found["wins"], found["dialogues_won"]
    if found["p_value"] is None:
        test = f"no test with fewer than {FEWEST_DIALOGUES} dialogues that one of them wins"
    else:
        p_value = "p < 0.001" if found["p_value"] < 0.001 else f"p = {found['p_value']:.3f}"
        test = f"sign test over {sum(dialogues.values())} dialogues: {p_value}"
    agreement = "" if found["alpha"] is None else f"; Krippendorff's alpha of the judges: {found['alpha']:.2f}"
    judges = "One judge" if len(found["judges"]) == 1 else f"{len(found['judges'])} judges"
    return (
        f"{judges} preferred {one} {wins[one]} times and {two} {wins[two]} times in {found['items']} "
        f"pairs, with {found['ties']} ties ({test}{agreement})."
    )


def sign_test(first: int, second: int) -> float:
    """Two-sided p-value of so many wins each, if either were as likely (Dixon and Mood, 1946)."""
    tail = sum(math.comb(first + second, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2 ** (first + second))


def _alpha(judgements: Sequence[Judgement]) -> float | None:
    """Krippendorff's alpha for nominal data, by NLTK, over the items that several judged."""
    from nltk.metrics.agreement import AnnotationTask  # type: ignore[import-untyped]

    several = {item for item, count in Counter(item for _, item, _ in judgements).items() if count > 1}
    shared = [judgement for judgement in judgements if judgement[1] in several]
    if len({choice for _, _, choice in shared}) < 2:
        return None
    return float(AnnotationTask(data=shared).alpha())


def _correlations(evaluation: Evaluation, key: Mapping[str, Any], preference: Mapping[str, float]) -> dict[str, float]:
    missing = [name for name in key["systems"] if name not in evaluation.systems]
    if missing:
        raise KestrelError(
            f"evaluation.judgements: the sheet compares {missing[0]}, which is not scored; name its file too"
        )
    one, two = (evaluation.systems[name] for name in key["systems"])
    places = {reply.key: i for i, reply in enumerate(one.replies)}
    try:
        rows = [places[key["items"][item]["dialogue_id"], key["items"][item]["turn"]] for item in preference]
    except KeyError as error:
        reply = error.args[0]
        raise KestrelError(
            f"evaluation.judgements: the sheet has the reply in turn {reply[1]} of dialogue {reply[0]!r}, which these files "
            "do not have; score the files that the sheet was made of"
        ) from None
    found = {}
    statistics = [statistics_of(system, evaluation.choices) for system in (one, two)]
    for metric in METRICS:
        if metric.better and all(metric.name in of_system for of_system in statistics):
            sign = -1 if metric.better == "lower" else 1
            scores = [metric.score(of_system[metric.name][rows]) for of_system in statistics]
            tau = kendall(sign * (scores[0] - scores[1]), np.array(list(preference.values())))
            if math.isfinite(tau):
                found[metric.name] = tau
    return found


def kendall(x: Array, y: Array) -> float:
    """Kendall's tau-b of two arrays of shape (N,); not a number where one of them is constant or has gaps."""
    a, b = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
