"""Fills docs/results.md and the head of README.md, and draws Images/results.png, from what `make results` has measured.

    make results-page

Scores, intervals and tests are computed here, from the sums of each test dialogue in the record. The seeds of an arm are
pooled for its score and its interval; their spread is the standard deviation of the scores of each.
"""

from __future__ import annotations

import sys
from functools import cache
from statistics import stdev
from typing import Any

import numpy as np
from blocks import ROOT, fill_page, table

sys.path.insert(0, str(ROOT))

from benchmarks.experiments import read_record
from benchmarks.results import ARMS, RECORD
from kestrel.evaluation.metric_table import BY_NAME
from kestrel.evaluation.resampling import Array, Dialogues, holm, pseudo_values

RESAMPLES = 1000
SYSTEMS = (
    "constant_reply", "constant_words", "base-plain", "base-chat", "original", "trl-defaults", "trl-turns", "trl-dialogues", "kestrel-plain",
    "kestrel-chat", "kestrel-plain-16bit", "kestrel-chat-16bit",
)  # fmt: skip
HEAD = ("base-chat", "original", "trl-turns", "trl-dialogues", "kestrel-chat")
VARIED = ("kestrel-chat", "attention", "r-4", "r-64", "lr-1e-4", "lr-2e-4", "lr-1e-3", "lr-2e-3")
# Metric, heading, format, factor.
COLUMNS = (
    ("perplexity.token", "perplexity", ".1f", 1), ("perplexity.bits_per_byte", "bits/byte", ".3f", 1),
    ("bleu", "BLEU", ".2f", 1), ("rouge_l", "ROUGE-L", ".1f", 1), ("f1", "F1", ".1f", 1),
    ("hits_at_1", "hits@1 %", ".1f", 100), ("persona_f1", "persona F1", ".1f", 1), ("swap_accuracy", "swap %", ".1f", 100),
    ("stopped_by_eos", "ends %", ".0f", 100), ("length_ratio", "length", ".2f", 1),
)  # fmt: skip
TESTED = ("perplexity.bits_per_byte", "bleu", "rouge_l", "f1", "hits_at_1")
PICTURE = "![Bits per byte, F1 and hits@1 of the systems, with intervals]({}/results.png)"
TRIVIAL = {"constant_reply": "one reply to everything", "constant_words": "one bag of words to everything"}


@cache
def record() -> list[dict[str, Any]]:
    return read_record(RECORD)


def lines_of(arm: str) -> list[dict[str, Any]]:
    """One line per seed."""
    return [line for line in record() if line["arm"] == arm]


def measured(arms: tuple[str, ...]) -> list[str]:
    return [arm for arm in arms if lines_of(arm)]


@cache
def sums() -> dict[str, dict[str, Array]]:
    """By arm, the mean of its seeds, and by ARM/SEED: sums over the dialogues by metric, shape (D, K).

    Not their sum: a test exchanges dialogues between two arms, which may have unequal numbers of seeds.
    """
    systems: dict[str, dict[str, Array]] = {}
    for arm in {line["arm"] for line in record() if "sums" in line}:
        seeds = [{name: np.array(rows, float) for name, rows in line["sums"].items()} for line in lines_of(arm)]
        systems[arm] = {name: np.mean([seed[name] for seed in seeds], axis=0) for name in seeds[0]}
        systems |= {f"{arm}/{number}": seed for number, seed in enumerate(seeds)}
    return systems


def dialogues() -> Dialogues:
    count = next(len(rows) for system in sums().values() for rows in system.values())
    return Dialogues([f"{number:06}" for number in range(count)], RESAMPLES, seed=0)


def point(arm: str, metric: str) -> float:
    return float(BY_NAME[metric].score(sums()[arm][metric].sum(axis=0)[None])[0])


def interval_of(arm: str, metric: str) -> list[float] | None:
    """95%, over dialogues."""
    values = pseudo_values(sums()[arm][metric], BY_NAME[metric].score)
    return BY_NAME[metric].clipped(dialogues().intervals({arm: values}, {arm: point(arm, metric)})[arm])


def cell(arm: str, metric: str, show: str, factor: int, interval: bool = True) -> str:
    """A score, the 95% interval over dialogues, and the spread over seeds."""
    if metric not in sums()[arm]:
        return "–"
    text = format(point(arm, metric) * factor, show)
    between = interval_of(arm, metric) if interval else None
    if between is not None:
        text += " [" + ", ".join(format(end * factor, show) for end in between) + "]"
    seeds = [point(f"{arm}/{number}", metric) * factor for number in range(len(lines_of(arm)))]
    return f"{text} ± {stdev(seeds):{show}}" if len(seeds) > 1 else text


def row(arm: str, interval: bool) -> list[str]:
    """A row of a table: scores, seconds of training, peak memory."""
    training = [line["training"] for line in lines_of(arm) if line.get("training")]
    cells = [cell(arm, metric, show, factor, interval and metric in TESTED) for metric, _, show, factor in COLUMNS]
    seconds = f"{np.mean([t['seconds'] for t in training]):.0f}" if training else "–"
    peaks = [t.get("peak_gpu_bytes", t.get("peak_bytes", t.get("peak_resident_bytes"))) for t in training]
    peak = f"{max(peaks) / 2**30:.1f}" if peaks else "–"
    return [TRIVIAL.get(arm) or ARMS[arm].what, *cells, seconds, peak]


def systems_table(arms: tuple[str, ...], interval: bool) -> str:
    head = ["", *(heading for _, heading, *_ in COLUMNS), "s", "GiB"]
    return table(head, [row(arm, interval) for arm in measured(arms)], numeric=True)


def tests() -> str:
    """Each arm against others, on the same dialogues; p-values adjusted by Holm within each table."""
    return "\n\n".join(tests_against(arm) for arm in ("original", "trl-dialogues", "base-chat") if lines_of(arm))


def tests_against(against: str) -> str:
    arms = [arm for arm in measured(SYSTEMS) if arm != against]
    pairs = {
        (arm, metric): (sums()[arm][metric], sums()[against][metric], BY_NAME[metric].score)
        for arm in arms
        for metric in TESTED
        if metric in sums()[arm]
    }
    p_values = dialogues().p_values(pairs) if pairs else {}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))

    def shown(arm: str, metric: str) -> str:
        if (arm, metric) not in pairs:
            return "–"
        difference = (point(arm, metric) - point(against, metric)) * (100 if metric == "hits_at_1" else 1)
        p_value = adjusted[arm, metric]
        show = "+.3f" if metric == "perplexity.bits_per_byte" else "+.1f"
        return f"{difference:{show}}" + ("" if p_value is None else f" (p = {p_value:.3f})")

    rows = [[TRIVIAL.get(arm) or ARMS[arm].what, *(shown(arm, metric) for metric in TESTED)] for arm in arms]
    head = [f"Against {ARMS[against].what}", *(BY_NAME[metric].label for metric in TESTED)]
    return table(head, rows, numeric=True)


def made_on() -> str:
    lines = [line for line in record() if "device" in line]
    (data,) = lines_of("data")
    versions = lines[-1]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    counts = ", ".join(f"{count} {split}" for split, count in data["dialogues"].items())
    jobs = sorted({line["jobs"] for line in lines})
    beside = f"{jobs[0]} to {jobs[-1]}" if len(jobs) > 1 else str(jobs[0])
    commits = ", ".join(dict.fromkeys(str(line["commit"])[:10] for line in lines))
    return (
        f"{counts} dialogues, {data['replies']['test']:,} replies scored; {beside} experiments side by side, so that seconds of "
        f"different rows are hardly comparable, on {lines[-1]['device']}, {named}; code of {commits}, {lines[-1]['date']}."
    )


def answers() -> str:
    """The shown dialogues with the answers of three systems, of the first seed."""
    (data,) = lines_of("data")
    shown = [arm for arm in ("base-chat", "original", "kestrel-chat") if lines_of(arm)]
    parts = []
    for dialogue in data["shown"]:
        said = {arm: iter(lines_of(arm)[0]["answers"][dialogue["dialogue_id"]]) for arm in shown}
        rows = [
            [turn["text"], "", *[""] * len(shown)]
            if turn["speaker"] == "partner"
            else ["", turn["text"], *(next(said[arm]) for arm in shown)]
            for turn in dialogue["turns"]
        ]
        merged = [[a[0], *b[1:]] for a, b in zip(rows[::2], rows[1::2], strict=False)]
        escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in merged]
        head = ["partner", "the person", *(ARMS[arm].what for arm in shown)]
        parts.append(f"**{' '.join(dialogue['persona'])}**\n\n" + table(head, escaped))
    return "\n\n".join(parts)


def blocks(page: str = "docs/results.md") -> dict[str, str]:
    """What a page holds; where there is no record, that there is none."""
    if not record():
        names = ("results", "answers") if page == "README.md" else ("systems", "tests", "variations", "answers")
        return dict.fromkeys(names, "Not measured yet: run `make results`.")
    if page == "README.md":
        results = f"{systems_table(HEAD, interval=False)}\n\n{made_on()}\n\n{PICTURE.format('Images')}"
        return {"results": results, "answers": answers()}
    return {
        "systems": f"{systems_table(SYSTEMS, interval=True)}\n\n{made_on()}\n\n{PICTURE.format('../Images')}",
        "tests": tests(),
        "variations": systems_table(VARIED, interval=False),
        "answers": answers(),
    }


def draw() -> None:
    """Bits per byte and F1 of the systems, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = measured(HEAD)[::-1]
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.55 * len(arms) + 1), sharey=True)
    for axis, metric, factor in zip(axes, ("perplexity.bits_per_byte", "f1", "hits_at_1"), (1, 1, 100), strict=True):
        for place, arm in enumerate(arms):
            if metric not in sums()[arm]:
                continue
            value = point(arm, metric) * factor
            ends = np.array(interval_of(arm, metric) or [value / factor] * 2) * factor
            color = "#1b7f5c" if arm.startswith("kestrel") else "#8793a0"
            axis.barh(place, value, xerr=[[value - ends[0]], [ends[1] - value]], color=color, height=0.62)
        better = "lower" if BY_NAME[metric].better == "lower" else "higher"
        axis.set_title(f"{BY_NAME[metric].label}, {better} is better", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), [ARMS[arm].what for arm in arms])
    figure.tight_layout()
    figure.savefig(ROOT / "Images" / "results.png", dpi=130, facecolor="white")


def main() -> int:
    for page in ("docs/results.md", "README.md"):
        fill_page(page, blocks(page))
    if record():
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
