"""From generation files to everything that metrics.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel import __version__
from kestrel.config import settings
from kestrel.evaluation.bootstrap import PAIRED_TEST, Bootstrap, point_scores, total
from kestrel.evaluation.breakdown import breakdowns
from kestrel.evaluation.comparisons import best_trivial, paired_tests, verdicts
from kestrel.evaluation.generations import Generations, Reply, System
from kestrel.evaluation.metric_table import DETAILED, METRICS
from kestrel.evaluation.metrics import NORMALIZERS, Answers, Array, answers_of
from kestrel.evaluation.persona import rarity_of
from kestrel.evaluation.spread import order_verdicts, separate_orders, spread_over_orders, spread_over_seeds
from kestrel.evaluation.trivial_systems import trivial_replies
from kestrel.evaluation.writing import writing_notes

if TYPE_CHECKING:
    from kestrel.evaluation.consistency import NliModel

_FEW_DIALOGUES = 30


@dataclass
class Evaluation:
    """A scored table.

    Attributes:
        metrics: what metrics.json holds.
        systems: the rows of the table, in its order, all with N replies to the same contexts.
        further: replies with the persona in another order, which have no row in the table, by their file's system.
        rarity: weights of words, of `persona.rarity_of`.
    """

    metrics: dict[str, Any]
    systems: dict[str, System]
    further: dict[str, list[Reply]] = field(default_factory=dict)
    rarity: dict[str, float] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the systems that are one of: system (a file), base (its untuned model), trivial, gold."""
        return [name for name, system in self.systems.items() if system.kind in kinds]

    def texts(self, further: bool = False) -> dict[str, list[tuple[str, str]]]:
        """(response, reference) of each reply as BLEU and ROUGE-L saw them, by system; with `further`, of those too."""
        normalize = NORMALIZERS[self.metrics["normalization"]]
        replies = {name: system.replies for name, system in self.systems.items()} | (self.further if further else {})
        return {name: [(normalize(r.response), normalize(r.reference)) for r in rows] for name, rows in replies.items()}


def evaluate_files(
    files: Sequence[Generations],
    notes: Sequence[str],
    options: settings.Evaluation,
    seed: int,
    search: Sequence[str] | None,
    nli: NliModel | None = None,
) -> Evaluation:
    """Scores files, aligned, beside trivial systems and the references themselves.

    Args:
        notes: what the reader must know already.
        search: human replies of another split for the constant systems and the weights of words, or None.
        nli: judges whether replies contradict the persona.
    """
    first, further = separate_orders(files)
    first = sorted(first, key=lambda file: {"adapter": 0, "base": 2}.get(file.group, 1))
    contexts = _fullest_contexts(first)
    systems, left_out = _all_systems(first, contexts, seed, search, nli)
    rarity = rarity_of(search or [reply.reference for reply in contexts])
    answers_in = partial(answers_of, normalization=options.normalization, stemmer=options.stemmer, rarity=rarity)
    answers = {name: answers_in(system.replies) for name, system in systems.items()}
    for name, system in systems.items():
        system.statistics = statistics_of(answers[name])
    statistics = {name: system.statistics for name, system in systems.items()}
    bootstrap = Bootstrap(statistics, [reply.dialogue_id for reply in contexts], options.resamples, seed)
    paired = paired_tests(bootstrap, systems)
    orders = {}
    for file in (file for file in first if file.system in further):
        others = further[file.system]
        points = [point_scores(statistics_of(answers_in(other.replies))) for other in others]
        orders[file.system] = spread_over_orders(file, others, [bootstrap.point[file.system], *points])
    rival = best_trivial(bootstrap, systems, DETAILED)
    shown = [*(file.system for file in first), *([rival] if rival else [])]
    metrics = _header(first, contexts, options, seed) | {
        "inputs": [
            {"system": file.system, "file": str(file.path), "sha256": file.sha256, "replies": len(file.replies)}
            for file in files
        ],
        "systems": {
            name: {"kind": system.kind, "made_by": system.made_by}
            | _entry(name, answers[name], system.statistics, bootstrap, options.stemmer)
            for name, system in systems.items()
        },
        "persona_orders": orders,
        "groups": spread_over_seeds({file.system: file.seed_group for file in first}, bootstrap.point),
        "paired_test": PAIRED_TEST,
        "paired": paired,
        "verdicts": [*verdicts(systems, paired), *order_verdicts(orders, systems)],
        **breakdowns(contexts, {name: statistics[name][DETAILED.name] for name in shown}, bootstrap),
    }
    metrics["notes"] = [*notes, *_file_notes(first), *left_out, *writing_notes(first, options.normalization)]
    if metrics["n_dialogues"] == 1:
        metrics["notes"].append("WARNING: one dialogue gives no intervals and no tests.")
    elif metrics["n_dialogues"] < _FEW_DIALOGUES:
        metrics["notes"].append(
            f"WARNING: intervals from {metrics['n_dialogues']} dialogues are too narrow; take them as a hint only."
        )
    other_orders = {f.system: f.replies for group in further.values() for f in group}
    return Evaluation(metrics, systems, other_orders, rarity)


def _all_systems(
    files: Sequence[Generations],
    contexts: Sequence[Reply],
    seed: int,
    search: Sequence[str] | None,
    nli: NliModel | None,
) -> tuple[dict[str, System], list[str]]:
    """The rows of the table, and what could not be made, and why."""
    systems = {
        file.system: System(
            kind="base" if file.group == "base" else "system",
            made_by=str(file.path),
            replies=file.replies,
            folder=file.path.resolve().parent,
            group=file.seed_group,
        )
        for file in files
    }
    trivial, notes = trivial_replies(contexts, seed, search)
    gold = [reply.with_response(reply.reference) for reply in contexts]
    systems |= trivial | {"gold": System("gold", "the references themselves", gold)}
    if nli:
        for system in systems.values():
            system.replies = nli.judge(system.replies)
    return systems, notes


def statistics_of(answers: Answers) -> dict[str, Array]:
    """Statistics by metric, shape (N, K), of the metrics for which the replies have what is needed."""
    computed = {metric.name: metric.compute_statistics(answers) for metric in METRICS}
    return {name: array for name, array in computed.items() if array is not None}


def _fullest_contexts(files: Sequence[Generations]) -> list[Reply]:
    """The first file's replies, with persona and history from another one where the first has none."""
    replies = files[0].replies
    for key in ("persona", "history"):
        source = next((file for file in files if getattr(file.replies[0], key) is not None), None)
        if source is not None and source is not files[0]:
            replies = [replace(r, **{key: getattr(o, key)}) for r, o in zip(replies, source.replies, strict=True)]
    return replies


def _header(
    files: Sequence[Generations], contexts: Sequence[Reply], options: settings.Evaluation, seed: int
) -> dict[str, Any]:
    """What was scored, and how."""
    split = next((file.split for file in files if file.split), None)
    dialogues = len({reply.dialogue_id for reply in contexts})
    signature = {
        "kestrel": __version__, "split": split or "unknown", "replies": len(contexts), "dialogues": dialogues,
        "norm": options.normalization, "bootstrap": "dialogues", "resamples": options.resamples, "seed": seed,
    }  # fmt: skip
    signature |= {"nli": options.nli} if options.nli else {}
    return {
        "signature": "|".join(f"{key}:{value}" for key, value in signature.items()),
        "split": split,
        "n_replies": len(contexts),
        "n_dialogues": dialogues,
        "normalization": options.normalization,
    }


def _entry(
    name: str, answers: Answers, statistics: Mapping[str, Array], bootstrap: Bootstrap, stemmer: bool
) -> dict[str, Any]:
    """One system's scores as metrics.json has them."""
    entry: dict[str, Any] = {"ci95": {}}
    for metric in METRICS:
        if metric.overall:
            metric.write(entry, metric.overall(answers), None, {})
        elif metric.name in statistics:
            details = metric.details(answers, total(statistics[metric.name])) if metric.details else {}
            if metric.signature:
                details["signature"] = metric.signature(stemmer)
            interval = bootstrap.interval(bootstrap.draws[name][metric.name])
            metric.write(entry, bootstrap.point[name][metric.name], interval, details)
    return entry


def _file_notes(files: Sequence[Generations]) -> list[str]:
    notes = []
    for file in files:
        # Candidates are scored only on request; that they are absent from a file that has all else is no news.
        if set(file.missing) - {"candidate_nll", "response_tokens"}:
            lost = ", ".join(metric.label for metric in METRICS if set(metric.needs) & set(file.missing))
            note = f"{file.path} has no {', '.join(file.missing)}." + (f" Left out for it: {lost}." if lost else "")
            notes.append(note + (" Each row counts as a dialogue of its own." if file.numbered else ""))
        sizes = {len(reply.candidate_nll) for reply in file.replies if reply.candidate_nll}
        if len(sizes) > 1:
            notes.append(
                f"WARNING: {file.path} has from {min(sizes)} to {max(sizes)} candidates per reply; hits@1 depends on "
                "their number and compares with no published value."
            )
    return notes


def write_responses(folder: Path, evaluation: Evaluation) -> None:
    """Writes the scored texts, one reply per line, so that any tool can score them again.

    `sacrebleu reference.txt -i SYSTEM.txt -m bleu` gives the table's BLEU to the last digit. The file of the references
    is reference.txt; it is also what the row gold answers.
    """
    folder.mkdir()
    for name, pairs in evaluation.texts(further=True).items():
        if name == "gold":
            name = "reference"
        safe = re.sub(r"[^\w@.+-]+", "_", name)
        (folder / f"{safe}.txt").write_text("".join(f"{response}\n" for response, _ in pairs), encoding="utf-8")
