"""What a dataset holds and what reading the source did to it: for statistics.json and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kestrel.data.read_counts import ReadCounts
from kestrel.data.split_statistics import SplitStatistics
from kestrel.data.splits import Splitter


def as_json(
    splitter: Splitter, statistics: Mapping[str, SplitStatistics], counts: Mapping[str, ReadCounts]
) -> dict[str, Any]:
    """The content of statistics.json; `statistics` and `counts` are by split."""
    corpus = {
        split: {
            "origin": splitter.origin[split],
            "persona_overlap": splitter.persona_overlap.get(split),
            "read": counts[split].read,
            "dropped": dict(counts[split].dropped),
            "repaired": dict(counts[split].repaired),
        }
        for split in splitter.splits
    }
    return {"splits": {split: each.as_json() for split, each in statistics.items()}, "corpus": corpus}


def as_text(splitter: Splitter, statistics: Mapping[str, SplitStatistics], counts: Mapping[str, ReadCounts]) -> str:
    """A table with a line a split; below it what was dropped and repaired, and the personas that are in train too."""
    head = f"{'split':<11}{'dialogues':>10}{'replies':>9}{'tokens':>12}{'supervised':>12}{'median':>8}{'max':>7}"
    lines = [f"\n{head}{'turns cut':>11}  from"]
    for split, each in statistics.items():
        values, origin = each.as_json(), splitter.origin[split]
        lengths = values["tokens_a_dialogue"]
        lines.append(
            f"{split:<11}{each.dialogues:>10,}{each.replies:>9,}{each.tokens:>12,}{values['supervised_share']:>12.1%}"
            f"{lengths['p50']:>8,}{lengths['max']:>7,}{each.turns_cut:>11,}  "
            + (origin if "cut" in origin else f"the source's {origin}")
        )
        lines += [f"  {count:,} dropped: {reason}" for reason, count in each.dropped.items()]
    for split, read in counts.items():
        if read.dropped or read.repaired:
            lines.append(f"\nread for {split}:\n{read.table()}")
    for split, personas in splitter.persona_overlap.items():
        if shared := personas["in_train"]:
            lines.append(
                f"\n{shared:,} of the {personas['personas']:,} personas of {split} are in train too, as in the source"
            )
    return "\n".join(lines)
