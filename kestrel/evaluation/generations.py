"""Reads generation files, ours or another tool's: one JSON object per line and reply."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.generation.files import order_in_name, split_and_system
from kestrel.runtime.manifest import sha256_of

STOPPED_BY = ("eos", "length", "stop_string")
# What a row may leave out. A file has a key in every row or in none, but for candidates, which a corpus may offer for
# some replies only.
OPTIONAL = (
    "dialogue_id", "persona", "history", "stopped_by", "response_tokens", "reference_nll", "reference_tokens",
    "candidate_nll",
)  # fmt: skip
_MOST_PROBLEMS = 10
_SEED_SUFFIX = re.compile(r"^(?P<group>.+?)[._-]?seed[._-]?\d+$")


@dataclass(frozen=True, slots=True)
class Reply:
    """One row: what a system answered at one turn of a dialogue, and what the person had answered.

    Attributes:
        dialogue_id, turn: which reply; `turn` is the index into the dialogue's turns.
        reference, response: one line each; line breaks in the file have become spaces.
        line: of the row in its file, from 1.
        history: the turns before, oldest first.
        reference_nll: negative log-likelihood of the reference, summed over its `reference_tokens` tokens, in nats.
        candidate_nll: (NLL in nats, tokens) of each distractor, in the dataset's order, without the reference.
    """

    dialogue_id: str
    turn: int
    reference: str
    response: str
    line: int
    persona: tuple[str, ...] | None = None
    history: tuple[Turn, ...] | None = None
    stopped_by: str | None = None
    response_tokens: int | None = None
    reference_nll: float | None = None
    reference_tokens: int | None = None
    candidate_nll: tuple[tuple[float, int], ...] | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.dialogue_id, self.turn

    def with_response(self, response: str) -> Reply:
        """The same context and reference with a response that no model gave."""
        return Reply(self.dialogue_id, self.turn, self.reference, response, self.line, self.persona, self.history)


@dataclass
class Generations:
    """The replies of one system on one split, in the order of the file.

    Attributes:
        split: from the file's name; None where it names none.
        numbered: the file names no dialogues, so that each row is one, called by its number.
        missing: keys of `OPTIONAL` that the file does not have.
    """

    system: str
    split: str | None
    path: Path
    sha256: str
    replies: list[Reply]
    numbered: bool = False
    missing: tuple[str, ...] = ()

    @property
    def order(self) -> int:
        """Of the persona's sentences, by the file's name; 0 is the order as given."""
        return order_in_name(split_and_system(self.path)[1])[1]

    @property
    def name_without_order(self) -> str:
        """What files of this system in several orders share in their names."""
        return order_in_name(split_and_system(self.path)[1])[0]

    @property
    def group(self) -> str:
        """What several seeds and persona orders of this system share in their names."""
        name = self.name_without_order
        seed = _SEED_SUFFIX.match(name)
        return seed["group"] if seed else name


def read_generations(path: Path) -> Generations:
    """Reads and checks one file.

    Args:
        path: JSON lines in UTF-8. `reference` and `response` are required, `turn` and `OPTIONAL` are not. `history`
            holds {"speaker", "text"} objects, or plain strings of which the last one is the partner's.

    Raises:
        KestrelError: names the file and the line of each problem, ten at most.
    """
    problems: list[tuple[int, str]] = []
    rows = list(_json_rows(path, problems))
    if not rows and not problems:
        raise KestrelError(f"{path} has no rows; a generation file has one JSON object per line and reply")
    present = {key for _, row in rows for key in row if row[key] is not None}
    replies = _checked_replies(rows, present, problems)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = [f"{path}:{line}: {problem}" for line, problem in sorted(problems)[:_MOST_PROBLEMS]]
        shown += [f"... and {more} more"] if more > 0 else []
        raise KestrelError("generations cannot be scored; fix the file or leave it out\n  " + "\n  ".join(shown))
    split, system = split_and_system(path)
    missing = tuple(key for key in OPTIONAL if key not in present)
    return Generations(system, split, path, sha256_of(path), replies, "dialogue_id" not in present, missing)


def _json_rows(path: Path, problems: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects with the number of their line; what is none goes to `problems`."""
    for line, text in _lines(path):
        try:
            row = json.loads(text)
            if "\\u" in text:  # JSON can spell half of a surrogate pair, which no file can hold
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            problems.append((line, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"))
        except (ValueError, RecursionError) as error:
            problems.append((line, f"not JSON ({error})"))
        else:
            if isinstance(row, dict):
                yield line, row
            else:
                problems.append((line, f"expected an object with reference and response, found {_kind(row)}"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their number."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text
    except FileNotFoundError:
        raise KestrelError(f"{path} does not exist; generate.py writes it, or name another file") from None
    except IsADirectoryError:
        raise KestrelError(f"{path} is a folder; name the JSONL files in it") from None
    except UnicodeDecodeError as error:
        raise KestrelError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line)") from None


def _checked_replies(
    rows: list[tuple[int, dict[str, Any]]], present: set[str], problems: list[tuple[int, str]]
) -> list[Reply]:
    """A reply per row, each with a key of its own.

    Args:
        present: keys that some row has.
        problems: what is wrong goes here.
    """
    required = [key for key in (*OPTIONAL, "turn") if key in present and key != "candidate_nll"]
    replies: list[Reply] = []
    first_lines: dict[tuple[str, int], int] = {}
    turns_before: Counter[str] = Counter()
    for number, (line, row) in enumerate(rows, start=1):
        reader = _RowReader(row)
        for key in required:
            if row.get(key) is None:
                reader.problems.append(f"{key} is missing, other rows have it")
        reply = reader.reply(line, number)
        if "turn" not in present:
            # Replies of a dialogue follow each other; without the index into its turns, count them.
            reply = replace(reply, turn=turns_before[reply.dialogue_id])
            turns_before[reply.dialogue_id] += 1
        if not reader.problems and reply.key in first_lines:
            reader.problems.append(
                f"dialogue {reply.dialogue_id!r}, turn {reply.turn} is in line {first_lines[reply.key]} already"
            )
        first_lines.setdefault(reply.key, line)
        problems += [(line, problem) for problem in reader.problems]
        replies.append(reply)
    return replies


class _RowReader:
    """Reads the values of one row. What is wrong goes to `problems`, and something harmless takes its place."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        self.problems: list[str] = []

    def reply(self, line: int, number: int) -> Reply:
        """The row as a reply. `number` names its dialogue where the row does not."""
        dialogue_id, stopped_by = self.row.get("dialogue_id"), self.row.get("stopped_by")
        if isinstance(dialogue_id, bool) or not isinstance(dialogue_id, (str, int, type(None))):
            self.problems.append(f"dialogue_id: expected text, found {_kind(dialogue_id)}")
        if stopped_by is not None and stopped_by not in STOPPED_BY:
            self.problems.append(f"stopped_by: expected one of {', '.join(STOPPED_BY)}, found {stopped_by!r}")
        reference = self._text("reference")
        if isinstance(self.row.get("reference"), str) and not reference.strip():
            self.problems.append("reference is empty; a reply without a reference cannot be scored")
        reference_nll, tokens = self._optional("reference_nll", False, 0), self._optional("reference_tokens", True, 1)
        if (reference_nll is None) != (tokens is None):
            self.problems.append("reference_nll and reference_tokens belong together")
        return Reply(
            dialogue_id=f"row {number}" if dialogue_id is None else str(dialogue_id),
            turn=self._optional("turn", True, 0) or 0,
            reference=reference,
            response=self._text("response"),
            line=line,
            persona=self._persona(),
            history=self._history(),
            stopped_by=stopped_by,
            response_tokens=self._optional("response_tokens", True, 0),
            reference_nll=reference_nll,
            reference_tokens=tokens,
            candidate_nll=self._candidates(),
        )

    def _text(self, key: str) -> str:
        if key not in self.row:
            self.problems.append(f"{key} is missing")
        elif not isinstance(self.row[key], str):
            self.problems.append(f"{key}: expected text, found {_kind(self.row[key])}")
        else:
            return one_line(self.row[key])
        return ""

    def _number(self, value: Any, name: str, whole: bool, least: int) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            self.problems.append(f"{name}: expected {'an integer' if whole else 'a number'}, found {_kind(value)}")
        elif not math.isfinite(value) or value < least:
            expected = f"at least {least}" if least else "a finite value >= 0"
            self.problems.append(f"{name} is {value}, expected {expected}")
        else:
            return value
        return least

    def _optional(self, key: str, whole: bool, least: int) -> Any:
        return None if self.row.get(key) is None else self._number(self.row[key], key, whole, least)

    def _candidates(self) -> tuple[tuple[float, int], ...] | None:
        """None where the reply has no candidates."""
        pairs = self.row.get("candidate_nll")
        if pairs is None:
            return None
        if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return (
                tuple(
                    (self._number(nll, f"candidate_nll[{i}]", False, 0), self._number(n, f"its tokens [{i}]", True, 1))
                    for i, (nll, n) in enumerate(pairs)
                )
                or None
            )
        self.problems.append("candidate_nll: expected a list of [nll, tokens]")
        return None

    def _persona(self) -> tuple[str, ...] | None:
        sentences = self.row.get("persona")
        if sentences is None:
            return None
        if isinstance(sentences, list) and all(isinstance(sentence, str) for sentence in sentences):
            return tuple(one_line(sentence) for sentence in sentences)
        self.problems.append("persona: expected a list of sentences")
        return None

    def _history(self) -> tuple[Turn, ...] | None:
        history = self.row.get("history")
        if history is None:
            return None
        if not isinstance(history, list):
            self.problems.append(f"history: expected a list of turns, found {_kind(history)}")
            return None
        turns: list[Turn] = []
        for index, turn in enumerate(history):
            if isinstance(turn, str):
                partners = (len(history) - 1 - index) % 2 == 0
                turn = {"speaker": "partner" if partners else "self", "text": turn}
            speaker, text = (turn.get("speaker"), turn.get("text")) if isinstance(turn, dict) else (None, None)
            if speaker not in ("partner", "self") or not isinstance(text, str):
                self.problems.append(
                    f"history[{index}]: expected text, or an object with speaker (partner or self) and text"
                )
                return None
            turns.append(Turn(speaker, one_line(text)))
        return tuple(turns)


def _kind(value: Any) -> str:
    names = {"str": "text", "dict": "an object", "list": "a list", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, f"the number {value}")


def one_line(text: str) -> str:
    """Line breaks as spaces: tools that score files take a reply to be a line, and so do we."""
    return re.sub(r"\r\n|\r|\n", " ", text)
