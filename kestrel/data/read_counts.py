"""What reading a source did: dialogues read, kept and dropped, and repairs, by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXAMPLES_PER_REASON = 3


@dataclass
class ReadCounts:
    """Counts of one reading.

    `read == kept + dropped.total()` holds whenever the reading has finished: all three count dialogues, one for each
    owner of a conversation. Repairs count what their reason names (turns, texts, candidates, lines, rows).

    Attributes:
        read: dialogues found in the source.
        kept: dialogues passed on.
        dropped: dialogues left out, by reason.
        repaired: repairs, by reason; the reason begins with the unit that is counted.
        examples: reason -> the first few places where it happened.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, where: str) -> None:
        """Counts one dialogue that is left out."""
        self.dropped[reason] += 1
        self._add_example(reason, where)

    def repair(self, reason: str, where: str, times: int = 1) -> None:
        """Counts `times` repairs; none when `times` is 0."""
        if times:
            self.repaired[reason] += times
            self._add_example(reason, where)

    def add(self, other: ReadCounts) -> None:
        """Adds the counts of `other` to this one."""
        self.read += other.read
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.repaired.update(other.repaired)
        for reason, places in other.examples.items():
            for where in places:
                self._add_example(reason, where)

    def clear(self) -> None:
        """Resets all counts."""
        self.read = self.kept = 0
        for counts in (self.dropped, self.repaired, self.examples):
            counts.clear()

    def why_dropped(self) -> str:
        """The reasons for drops on one line; empty where nothing was dropped."""
        return "; ".join(f"{count:,}: {reason}" for reason, count in self.dropped.most_common())

    def table(self) -> str:
        """The counts as lines of text for a terminal: number, reason, the first place."""
        lines = [f"{self.read:>9,}  dialogues read", f"{self.kept:>9,}  dialogues kept"]
        for title, counts in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in counts.most_common():
                lines.append(f"{count:>9,}  {title}: {reason} (first at {self.examples[reason][0]})")
        return "\n".join(lines)

    def _add_example(self, reason: str, where: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(where)
