"""What reading a source did: dialogues read, kept and dropped, and repairs, by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ReadCounts:
    """Counts of one reading.

    `read == kept + dropped.total()` holds whenever the reading has finished: all three count dialogues, one for each
    owner of a conversation. Repairs count what their reason begins with (turns, texts, candidates, lines, rows).

    Attributes:
        dropped, repaired: by reason.
        first: reason -> the first place where it happened.
        personas_given: dialogues that got the persona of `data.persona`.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    personas_given: int = 0

    def drop(self, reason: str, where: str) -> None:
        """Counts one dialogue that is left out."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def skip(self, reason: str, where: str) -> None:
        """Counts one record that is read and left out before it is a dialogue."""
        self.read += 1
        self.drop(reason, where)

    def repair(self, reason: str, where: str, times: int = 1) -> None:
        """Counts `times` repairs; none when `times` is 0."""
        if times:
            self.repaired[reason] += times
            self.first.setdefault(reason, where)

    def add(self, other: ReadCounts) -> None:
        """Adds the counts of `other`, which were made after these."""
        self.read += other.read
        self.kept += other.kept
        self.personas_given += other.personas_given
        self.dropped.update(other.dropped)
        self.repaired.update(other.repaired)
        self.first = other.first | self.first

    def clear(self) -> None:
        self.read = self.kept = self.personas_given = 0
        for counts in (self.dropped, self.repaired, self.first):
            counts.clear()

    def table(self) -> str:
        """The counts as lines of text for a terminal: number, reason, the first place."""
        lines = [f"{self.read:>9,}  dialogues read", f"{self.kept:>9,}  dialogues kept"]
        for title, counts in (("dropped", self.dropped), ("repaired", self.repaired)):
            for reason, count in counts.most_common():
                lines.append(f"{count:>9,}  {title}: {reason} (first at {self.first[reason]})")
        return "\n".join(lines)


def reasons(dropped: Counter[str]) -> str:
    """The reasons for drops on one line; empty where nothing was dropped."""
    return "; ".join(f"{count:,}: {reason}" for reason, count in dropped.most_common())
