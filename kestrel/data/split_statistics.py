"""What a split of a dataset holds, in numbers."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kestrel.dialogue import Dialogue
from kestrel.prompt.prompt import Rendered


@dataclass
class SplitStatistics:
    """Counts of one split. Lengths are in tokens."""

    dialogues: int = 0
    replies: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated_dialogues: int = 0
    turns_cut: int = 0
    replies_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("i"), repr=False)

    def add(self, dialogue: Dialogue, rendered: Rendered) -> None:
        """Counts a dialogue that is written."""
        self.dialogues += 1
        self.replies += len(rendered.reply_spans)
        self.tokens += len(rendered.input_ids)
        self.supervised_tokens += sum([end - start for start, end in rendered.reply_spans])
        self.truncated_dialogues += rendered.first_turn > 0
        self.turns_cut += rendered.first_turn
        self.replies_cut += sum([turn.speaker == "self" for turn in dialogue.turns[: rendered.first_turn]])
        self.lengths.append(len(rendered.input_ids))

    def as_json(self) -> dict[str, Any]:
        """The counts, and shares and percentiles made of them."""
        lengths = np.asarray(self.lengths if self.lengths else [0])
        return {
            "dialogues": self.dialogues,
            "replies": self.replies,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "supervised_share": self.supervised_tokens / max(1, self.tokens),
            "tokens_a_dialogue": {
                "mean": float(lengths.mean()),
                **{f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95)},
                "max": int(lengths.max()),
            },
            "truncated_dialogues": self.truncated_dialogues,
            "turns_cut": self.turns_cut,
            "replies_cut": self.replies_cut,
            "dropped_at_rendering": dict(self.dropped),
        }

    def why_dropped(self) -> str:
        """What rendering dropped, by reason, on one line."""
        return "; ".join(f"{count:,}: {reason}" for reason, count in self.dropped.most_common()) or "there was none"
