"""From generation files to everything that metrics.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kestrel import __version__
from kestrel.evaluation.bootstrap import PAIRED_TEST, Bootstrap, point_scores
from kestrel.evaluation.breakdown import by_length, by_reply
from kestrel.evaluation.comparisons import best_trivial, paired_tests, spread_over_seeds, verdicts
from kestrel.evaluation.generations import OPTIONAL, Generations, Reply
from kestrel.evaluation.metrics import (
    SCORED_ON_100,
    Array,
    bleu_details,
    bleu_signature,
    convention_gap,
    distinct,
    normalizer,
    reply_statistics,
    rouge_signature,
)
from kestrel.evaluation.persona_orders import gather, order_verdicts, spread_over_orders
from kestrel.evaluation.trivial_systems import trivial_replies

_FEW_DIALOGUES = 30


@dataclass
class Evaluation:
    """A scored table.

    Attributes:
        metrics: what metrics.json holds.
        systems: the replies of every system of the table, in its order; N each, all to the same contexts.
        statistics: the columns of `reply_statistics` by system.
        further: replies with the persona in another order, which have no row in the table, by their file's system.
    """

    metrics: dict[str, Any]
    systems: dict[str, list[Reply]]
    statistics: dict[str, dict[str, Array]]
    further: dict[str, list[Reply]] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[str]:
        """Systems that are one of: system (a file), base (its untuned model), trivial, gold."""
        return [name for name, entry in self.metrics["systems"].items() if entry["kind"] in kinds]

    def texts(self, further: bool = False) -> dict[str, list[tuple[str, str]]]:
        """(response, reference) of each reply as BLEU and ROUGE-L saw them, by system; with `further`, of those too."""
        normalize = normalizer(self.metrics["normalization"])
        return {
            name: [(normalize(reply.response), normalize(reply.reference)) for reply in replies]
            for name, replies in (self.systems | (self.further if further else {})).items()
        }

    def add_extra(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds further metrics' numbers, by system and metric."""
        for name, numbers in scores.items():
            if numbers:
                self.metrics["systems"][name]["extra"] = numbers


def evaluate_files(
    files: Sequence[Generations],
    notes: Sequence[str],
    normalization: str,
    stemmer: bool,
    resamples: int,
    seed: int,
    search: Sequence[str] | None,
) -> Evaluation:
    """Scores lined-up files beside trivial systems and the references themselves.

    Args:
        files: from `alignment.line_up`.
        notes: what the reader must know already.
        normalization, stemmer, resamples, seed: as in the settings.
        search: human replies of another split for the constant systems, or None.
    """
    scored = files
    files, further = gather(files)
    contexts = _fullest_contexts(files)
    trivial, made_by, left_out = trivial_replies(contexts, seed, search)
    files = sorted(files, key=lambda file: {"adapter": 0, "base": 2}.get(file.group, 1))
    systems = {file.system: file.replies for file in files} | trivial
    systems["gold"] = [reply.answered(reply.reference) for reply in contexts]
    kinds = {file.system: "base" if file.group == "base" else "system" for file in files}
    kinds |= dict.fromkeys(trivial, "trivial") | {"gold": "gold"}
    made_by |= {file.system: str(file.path) for file in files} | {"gold": "the references themselves"}
    statistics = {name: reply_statistics(replies, normalization, stemmer) for name, replies in systems.items()}
    dialogues = [reply.dialogue_id for reply in contexts]
    bootstrap = Bootstrap(statistics, dialogues, resamples, seed)
    n_dialogues = len(set(dialogues))
    split = next((file.split for file in files if file.split), None)
    folders = {file.system: file.path.resolve().parent for file in files}
    paired = paired_tests(bootstrap, kinds, folders)
    orders = {
        file.system: spread_over_orders(
            file,
            further[file.system],
            [
                bootstrap.point[file.system],
                *(point_scores(reply_statistics(f.replies, normalization, stemmer)) for f in further[file.system]),
            ],
        )
        for file in files
        if file.system in further
    }
    rival = best_trivial(bootstrap, kinds, "rouge_l")
    shown = {name: statistics[name]["rouge_l"] for name in [file.system for file in files] + ([rival] if rival else [])}
    few = (
        f"WARNING: intervals from {n_dialogues} dialogues are too narrow; take them as a hint only."
        if n_dialogues > 1
        else "WARNING: one dialogue gives no intervals and no tests."
    )
    signature = {
        "kestrel": __version__, "split": split or "unknown", "replies": len(contexts), "dialogues": n_dialogues,
        "norm": normalization, "bootstrap": "dialogues", "resamples": resamples, "seed": seed,
    }  # fmt: skip
    metrics = {
        "signature": "|".join(f"{key}:{value}" for key, value in signature.items()),
        "split": split,
        "n_replies": len(contexts),
        "n_dialogues": n_dialogues,
        "normalization": normalization,
        "inputs": [
            {"system": file.system, "file": str(file.path), "sha256": file.sha256, "replies": len(file.replies)}
            for file in scored
        ],
        "systems": {
            name: {"kind": kinds[name], "made_by": made_by[name]}
            | _entry(name, replies, bootstrap, statistics[name], normalization, stemmer)
            for name, replies in systems.items()
        },
        "persona_orders": orders,
        "groups": spread_over_seeds({file.system: file.group for file in files}, bootstrap),
        "paired_test": PAIRED_TEST,
        "paired": paired,
        "verdicts": [*verdicts(kinds, paired), *order_verdicts(orders, kinds, folders)],
        "by_reply": by_reply(contexts, shown, bootstrap) if not all(file.numbered for file in files) else [],
        "by_length": by_length(contexts, shown, bootstrap),
        "notes": [
            *notes,
            *_file_notes(files),
            *left_out,
            *_convention_notes({file.system: file.replies for file in files}, normalization),
            *([few] if n_dialogues < _FEW_DIALOGUES else []),
        ],
    }
    return Evaluation(
        metrics, systems, statistics, {file.system: file.replies for group in further.values() for file in group}
    )


def _fullest_contexts(files: Sequence[Generations]) -> list[Reply]:
    """The first file's replies, with persona and history from another one where the first has none."""
    replies = files[0].replies
    for key in ("persona", "history"):
        lender = next((file for file in files if getattr(file.replies[0], key) is not None), None)
        if lender is not None and lender is not files[0]:
            replies = [replace(r, **{key: getattr(o, key)}) for r, o in zip(replies, lender.replies, strict=True)]
    return replies


def _entry(
    name: str,
    replies: Sequence[Reply],
    bootstrap: Bootstrap,
    statistics: Mapping[str, Array],
    normalization: str,
    stemmer: bool,
) -> dict[str, Any]:
    """One system's part of metrics.json."""
    point = bootstrap.point[name]
    entry: dict[str, Any] = {key: {"score": point[key], "ci95": bootstrap.interval(name, key)} for key in SCORED_ON_100}
    for key, lowercase in (("bleu", False), ("bleu_lc", True)):
        entry[key] |= bleu_details(statistics, key) | {"signature": bleu_signature(lowercase)}
    entry["rouge_l"]["signature"] = rouge_signature(stemmer)
    entry["rouge_l_other"]["signature"] = rouge_signature(not stemmer)
    entry["f1"]["signature"] = "type:f1|normalization:parlai|average:replies"
    intervals: dict[str, Any] = {}
    perplexity: dict[str, Any] = {}
    for key, value in point.items():
        if key.startswith("perplexity."):
            unit = key.removeprefix("perplexity.")
            perplexity[unit] = value if np.isfinite(value) else None
            perplexity.setdefault("ci95", {})[unit] = bootstrap.interval(name, key)
        elif key not in SCORED_ON_100 and np.isfinite(value):
            entry[key] = value
            intervals[key] = bootstrap.interval(name, key)
    if perplexity:
        entry["perplexity"] = perplexity
    if "hits_at_1" in entry:
        sizes = sorted({len(reply.candidate_nll) + 1 for reply in replies if reply.candidate_nll})
        entry["hits_at_1_candidates"] = sizes[0] if len(sizes) == 1 else [sizes[0], sizes[-1]]
        entry["hits_at_1_replies"] = int(statistics["ranked"].sum())
    entry["ci95"] = intervals
    normalize = normalizer(normalization)
    responses = [normalize(reply.response) for reply in replies]
    entry["distinct_1"], entry["distinct_2"] = distinct(responses, 1), distinct(responses, 2)
    return entry


def _file_notes(files: Sequence[Generations]) -> list[str]:
    notes = []
    for file in files:
        # Candidates are scored on demand only; that they are absent from a file that has all else is no news.
        if set(file.missing) - {"candidate_nll", "response_tokens"}:
            lost = "; ".join(dict.fromkeys(OPTIONAL[key] for key in file.missing))
            notes.append(f"{file.path} has no {', '.join(file.missing)}. Left out for it: {lost}.")
        sizes = {len(reply.candidate_nll) for reply in file.replies if reply.candidate_nll}
        if len(sizes) > 1:
            notes.append(
                f"WARNING: {file.path} has from {min(sizes)} to {max(sizes)} candidates a reply; hits@1 depends on "
                "their number and compares with no published value."
            )
    return notes


def _convention_notes(systems: Mapping[str, Sequence[Reply]], normalization: str) -> list[str]:
    parts = {
        "casing": "capital letters in {1:.0%} of its responses and {0:.0%} of the references",
        "spacing": "spaces before punctuation in {1:.0%} of its responses and {0:.0%} of the references",
    }
    mended: list[str] = {"raw": [], "lower": ["casing"], "parlai": ["casing", "spacing"]}[normalization]
    notes = []
    for name, replies in systems.items():
        gap = {kind: shares for kind, shares in convention_gap(replies).items() if kind not in mended}
        if gap:
            told = ", ".join(parts[kind].format(*shares) for kind, shares in gap.items())
            notes.append(
                f"WARNING: {name} writes in another convention than the references ({told}), which costs it BLEU "
                f"whatever it says. Score with --evaluation.normalization {'parlai' if 'spacing' in gap else 'lower'}, "
                "or write the training data as the references are written."
            )
    return notes


def write_responses(folder: Path, evaluation: Evaluation) -> None:
    """Writes the scored texts, a reply a line, so that any tool can score them again.

    `sacrebleu reference.txt -i SYSTEM.txt -m bleu` gives the table's BLEU to the last digit. The file of the references
    is reference.txt; it is also what the row gold answers.
    """
    folder.mkdir()
    for name, pairs in evaluation.texts(further=True).items():
        if name == "gold":
            name = "reference"
        safe = re.sub(r"[^\w@.+-]+", "_", name)
        (folder / f"{safe}.txt").write_text("".join(f"{response}\n" for response, _ in pairs), encoding="utf-8")
