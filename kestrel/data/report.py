"""What a dataset holds and what reading the source did to it: for statistics.json and for the terminal."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kestrel.config.settings import Settings
from kestrel.data.corpus import unused_settings
from kestrel.data.read_counts import ReadCounts
from kestrel.data.spelling import Spelling, described
from kestrel.data.splits import Splitter
from kestrel.dialogue import Dialogue
from kestrel.prompt.prompt import Rendered


@dataclass
class SplitStatistics:
    """Counts of one split of a dataset. Lengths are in tokens."""

    replies: int = 0
    supervised_tokens: int = 0
    truncated_dialogues: int = 0
    turns_cut: int = 0
    replies_cut: int = 0
    unknown_tokens: int = 0
    characters: int = 0
    line_breaks: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("i"), repr=False)

    def add(self, dialogue: Dialogue, rendered: Rendered, spelling: Spelling) -> None:
        """Counts a dialogue that is written."""
        texts = [*dialogue.persona, *(turn.text for turn in dialogue.turns)]
        self.characters += sum(map(len, texts))
        self.line_breaks += sum(["\n" in text for text in texts])
        if unknown := rendered.input_ids.count(spelling.unknown_id) if spelling.unknown_id is not None else 0:
            self.unknown_tokens += unknown
            self.unknown += spelling.unknown_characters(dialogue)
        self.replies += len(rendered.reply_spans)
        self.supervised_tokens += sum([end - start for start, end in rendered.reply_spans])
        self.truncated_dialogues += rendered.first_turn > 0
        self.turns_cut += rendered.first_turn
        self.replies_cut += sum([turn.speaker == "self" for turn in dialogue.turns[: rendered.first_turn]])
        self.lengths.append(len(rendered.input_ids))

    def as_json(self) -> dict[str, Any]:
        """The counts, and shares and percentiles made of them."""
        lengths = np.asarray(self.lengths or [0])
        tokens = int(lengths.sum())
        return {
            "dialogues": len(self.lengths),
            "replies": self.replies,
            "tokens": tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / max(1, tokens),
            "tokens_a_dialogue": {
                "mean": float(lengths.mean()),
                **{f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95)},
                "max": int(lengths.max()),
            },
            "truncated_dialogues": self.truncated_dialogues,
            "turns_cut": self.turns_cut,
            "replies_cut": self.replies_cut,
            "dropped_at_rendering": dict(self.dropped),
        } | self._unusual()

    def _unusual(self) -> dict[str, Any]:
        """What most data do not have, where they have it."""
        values = {
            "texts_of_several_lines": self.line_breaks,
            "unknown_tokens": self.unknown_tokens,
            "unknown_characters": dict(self.unknown),
        }
        return {key: value for key, value in values.items() if value}


def as_json(
    splitter: Splitter, statistics: Mapping[str, SplitStatistics], counts: Mapping[str, ReadCounts]
) -> dict[str, Any]:
    """The content of statistics.json; `statistics` and `counts` are by split."""
    corpus = {
        split: {
            "origin": splitter.origin[split],
            "persona_overlap": splitter.persona_overlap.get(split),
            "read": read.read,
            "dropped": dict(read.dropped),
            "repaired": dict(read.repaired),
        }
        for split, read in counts.items()
    }
    return {"splits": {split: each.as_json() for split, each in statistics.items()}, "corpus": corpus}


def as_text(
    splitter: Splitter,
    statistics: Mapping[str, SplitStatistics],
    counts: Mapping[str, ReadCounts],
    settings: Settings,
) -> str:
    """A table with a line a split; below it what was dropped and repaired, and what the dataset cannot hold or tell."""
    head = f"{'split':<11}{'dialogues':>10}{'replies':>9}{'tokens':>12}{'supervised':>12}{'median':>8}{'max':>7}"
    lines = [f"\n{head}{'turns cut':>11}  from"]
    for split, each in statistics.items():
        values, origin = each.as_json(), splitter.origin[split]
        lengths = values["tokens_a_dialogue"]
        lines.append(
            f"{split:<11}{values['dialogues']:>10,}{each.replies:>9,}{values['tokens']:>12,}"
            f"{values['supervised_share']:>12.1%}{lengths['p50']:>8,}{lengths['max']:>7,}{each.turns_cut:>11,}  "
            + (origin if "cut" in origin else f"the source's {origin}")
        )
        lines += [f"  {count:,} dropped: {reason}" for reason, count in each.dropped.items()]
    for split, read in counts.items():
        if read.dropped or read.repaired:
            lines.append(f"\nread for {split}:\n{read.table()}")
    lines += [f"\n{sentence}" for sentence in unused_settings(splitter.corpus)]
    if settings.data.persona and not any(read.personas_given for read in counts.values()):
        lines.append("\ndata.persona was not used: each dialogue has a persona of its own")
    for split, personas in splitter.persona_overlap.items():
        if shared := personas["in_train"]:
            cut = "cut" in splitter.origin[split]
            why = ": no score can tell how the model answers as somebody new" if cut else ", as in the source"
            lines.append(f"\n{shared:,} of the {personas['personas']:,} personas of {split} are in train too{why}")
    for split, each in statistics.items():
        lines += [f"\n{split}: {warning}" for warning in _warnings(each, settings)]
    return "\n".join(lines)


def _warnings(split: SplitStatistics, settings: Settings) -> list[str]:
    found = []
    if split.unknown_tokens:
        characters = (
            described(split.unknown, split.characters) if split.unknown else "words, though no single character"
        )
        share = split.unknown_tokens / sum(split.lengths)
        found.append(
            f"{split.unknown_tokens:,} unknown tokens ({share:.1%}); the tokenizer has no token for {characters}"
        )
    if split.line_breaks and settings.prompt.format != "chat":
        found.append(
            f"{split.line_breaks:,} texts of several lines, which prompt.format {settings.prompt.format} writes in one; "
            "chat keeps the lines"
        )
    elif split.line_breaks and "\n" in settings.generation.stop_strings:
        found.append(
            f"{split.line_breaks:,} texts of several lines; answers end at the first line break unless you set "
            "generation.stop_strings: []"
        )
    return found
