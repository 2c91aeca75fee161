"""From generation files to everything that metrics.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel import __version__
from kestrel.config import settings
from kestrel.evaluation.breakdown import breakdowns
from kestrel.evaluation.comparisons import best_trivial, paired_tests
from kestrel.evaluation.generations import Generations, Reply
from kestrel.evaluation.metric_table import BY_NAME, DETAILED, METRICS
from kestrel.evaluation.metrics import Choices
from kestrel.evaluation.persona import rarity_of
from kestrel.evaluation.resampling import TEST, Dialogues, pseudo_values
from kestrel.evaluation.spread import order_verdicts, separate_orders, spread_over_orders, spread_over_seeds
from kestrel.evaluation.systems import Answered, System, score, system_of
from kestrel.evaluation.trivial_systems import trivial_systems
from kestrel.evaluation.units import Units, choose_units
from kestrel.evaluation.verdicts import verdicts
from kestrel.evaluation.writing import writing_notes

if TYPE_CHECKING:
    from kestrel.evaluation.consistency import NliModel


@dataclass
class Evaluation:
    """A scored table.

    Attributes:
        metrics: what metrics.json holds.
        systems: the rows of the table, in its order, all with N replies to the same contexts.
        choices: how their texts were compared.
        further: files with the persona in another order, which have no row in the table.
    """

    metrics: dict[str, Any]
    systems: dict[str, System]
    choices: Choices
    further: dict[str, System] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the systems that are one of: system (a file), base (its untuned model), trivial, gold."""
        return [name for name, system in self.systems.items() if system.kind in kinds]

    def texts(self, system: System) -> list[tuple[str, str]]:
        """(response, reference) of each reply as BLEU and ROUGE-L saw them."""
        normalize = self.choices.normalize
        return [(normalize(reply.response), normalize(reply.reference)) for reply in system.replies]


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
    sizes = {len(reply.references) for reply in contexts}
    units = choose_units((text for reply in contexts for text in reply.references), options.tokenize)
    rarity = rarity_of(search or [reply.reference for reply in contexts], units)
    several = sizes.pop() if len(sizes) == 1 else -1
    choices = Choices(units, options.normalization, options.stemmer, several, rarity)

    trivial, left_out = trivial_systems(contexts, seed, search, units)
    gold = Answered(contexts, [reply.reference for reply in contexts])
    systems = {file.system: system_of(file) for file in first} | trivial
    systems["gold"] = System("gold", "the references themselves", gold)
    if nli:
        for system in systems.values():
            system.replies = nli.judge(system.replies)
    other_orders = {file.system: system_of(file) for others in further.values() for file in others}
    dialogues = Dialogues([reply.dialogue_id for reply in contexts], options.resamples, seed)
    score(systems | other_orders, dialogues, choices)

    paired = paired_tests(systems, dialogues)
    orders = {}
    for file in (file for file in first if file.system in further):
        named = [file.system, *(other.system for other in further[file.system])]
        points = [(systems | other_orders)[name].point for name in named]
        orders[file.system] = spread_over_orders(file, further[file.system], points)
    seeds, no_seeds = spread_over_seeds(first, systems)
    rival = best_trivial(systems, DETAILED)
    shown = [*(file.system for file in first), *([rival] if rival else [])]
    metrics = _header(first, dialogues, choices, options, seed) | {
        "inputs": [
            {"system": file.system, "file": str(file.path), "sha256": file.sha256, "replies": len(file.replies)}
            for file in files
        ],
        "systems": _entries(systems, dialogues, choices),
        "persona_orders": orders,
        "groups": seeds,
        "paired_test": TEST,
        "paired": paired,
        "verdicts": [*verdicts(systems, paired, dialogues.count), *order_verdicts(orders, systems)],
        **breakdowns(contexts, {name: systems[name].detail for name in shown}, dialogues, units),
    }
    metrics["notes"] = [*notes, *_file_notes(first), *left_out, *no_seeds, *writing_notes(first, options.normalization)]
    metrics["notes"] += _notes_on_units(units, systems["gold"])
    return Evaluation(metrics, systems, choices, other_orders)


def _notes_on_units(units: Units, gold: System) -> list[str]:
    notes = []
    if not gold.point["bleu"]:
        notes.append(
            "WARNING: no reference has four tokens in a row, so BLEU is 0 whatever is said, the references themselves "
            "too. Compare ROUGE-L and F1."
        )
    if units.tokenizer == "13a" and units.english:
        return notes
    words = "those of their English references" if units.english else "words of Unicode (UAX #29)"
    notes.append(
        f"BLEU counts the tokens of sacreBLEU's {units.tokenizer}, ROUGE-L and F1 compare {words}, which fits the "
        "script of the references; --evaluation.tokenize 13a scores as for English."
    )
    return notes


def _fullest_contexts(files: Sequence[Generations]) -> list[Reply]:
    """The first file's replies, with persona and history from another one where the first has none."""
    replies = files[0].replies
    for key in ("persona", "history"):
        source = next((file for file in files if getattr(file.replies[0], key) is not None), None)
        if source is not None and source is not files[0]:
            replies = [replace(r, **{key: getattr(o, key)}) for r, o in zip(replies, source.replies, strict=True)]
    return replies


def _header(
    files: Sequence[Generations], dialogues: Dialogues, choices: Choices, options: settings.Evaluation, seed: int
) -> dict[str, Any]:
    """What was scored, and how."""
    split = next((file.split for file in files if file.split), None)
    signature = {
        "kestrel": __version__, "split": split or "unknown", "replies": len(files[0].replies),
        "dialogues": dialogues.count, "norm": choices.normalization, "bootstrap": "dialogues", "resamples": options.resamples, "seed": seed,
    }  # fmt: skip
    if options.nli:  # what is published names no folder of this machine
        signature["nli"] = Path(options.nli).name if Path(options.nli).exists() else options.nli
    return {
        "signature": "|".join(f"{key}:{value}" for key, value in signature.items()),
        "split": split,
        "n_replies": len(files[0].replies),
        "n_dialogues": dialogues.count,
        "normalization": choices.normalization,
    }


def _entries(systems: Mapping[str, System], dialogues: Dialogues, choices: Choices) -> dict[str, Any]:
    """Each system's scores as metrics.json has them."""
    pseudo = {
        (n, key): pseudo_values(sums, BY_NAME[key].score) for n, s in systems.items() for key, sums in s.sums.items()
    }
    intervals = dialogues.intervals(pseudo, {(n, key): systems[n].point[key] for n, key in pseudo})
    entries: dict[str, Any] = {}
    for name, system in systems.items():
        entry: dict[str, Any] = {"kind": system.kind, "made_by": system.made_by, "ci95": {}}
        for metric in METRICS:
            if metric.overall:
                texts = (choices.normalize(text) for text in system.responses)
                metric.write(entry, metric.overall(texts, choices.units), None, {})
            elif metric.name in system.sums:
                details = metric.details(system.replies, system.totals[metric.name]) if metric.details else {}
                if metric.signature:
                    details["signature"] = metric.signature(choices)
                interval = metric.clipped(intervals[name, metric.name])
                metric.write(entry, system.point[metric.name], interval, details)
        entries[name] = entry
    return entries


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


def file_name(system: str) -> str:
    """Of a system's texts in responses/."""
    return re.sub(r"[^\w@.+-]+", "_", "reference" if system == "gold" else system) + ".txt"


def write_responses(folder: Path, evaluation: Evaluation) -> None:
    """Writes the scored texts, one reply per line, so that any tool can score them again.

    `sacrebleu reference.txt -i SYSTEM.txt -m bleu` gives the table's BLEU to the last digit. The file of the references
    is reference.txt; it is also what the row gold answers.
    """
    folder.mkdir()
    for name, system in (evaluation.systems | evaluation.further).items():
        with (folder / file_name(name)).open("w", encoding="utf-8") as file:
            file.writelines(f"{response}\n" for response, _ in evaluation.texts(system))
