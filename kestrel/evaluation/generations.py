"""Reads generation files, ours or another tool's: one JSON object a reply and line."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.generation.files import order_in_name, split_and_system
from kestrel.runtime.manifest import sha256_of

STOPPED_BY = ("eos", "length", "stop_string")
# What a row may leave out, and what cannot be computed then. A file has a key in every row or in
# none, but for candidates, which a corpus may offer for some replies only.
OPTIONAL = {
    "dialogue_id": "which replies belong together: each row counts as a dialogue of its own",
    "persona": "random persona sentence, replies copied from the persona",
    "history": "copy of the partner's turn, replies copied from the history",
    "stopped_by": "share stopped by EOS",
    "response_tokens": "response length in the model's tokens",
    "reference_nll": "perplexity, hits@1",
    "reference_tokens": "perplexity, hits@1",
    "candidate_nll": "hits@1",
}
_MOST_PROBLEMS = 10
_SEED_SUFFIX = re.compile(r"^(?P<group>.+?)[._-]?seed[._-]?\d+$")


@dataclass(frozen=True, slots=True)
class Reply:
    """One row: what a system answered at one turn of a dialogue, and what the person had answered.

    Attributes:
        dialogue_id, turn: which reply; `turn` is the index into the dialogue's turns.
        reference, response: one line each; line breaks in the file have become spaces.
        history: the turns before, oldest first.
        reference_nll: negative log-likelihood of the reference, summed over its `reference_tokens` tokens, in nats.
        candidate_nll: (NLL in nats, tokens) of each distractor, in the dataset's order, without the reference.
        line: where the row stands in its file, from 1.
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

    def answered(self, response: str) -> Reply:
        """The same context and reference with another response, one that no model gave."""
        return replace(
            self,
            response=response,
            stopped_by=None,
            response_tokens=None,
            reference_nll=None,
            reference_tokens=None,
            candidate_nll=None,
        )


@dataclass
class Generations:
    """The replies of one system on one split, in the order of the file.

    Attributes:
        group: what several seeds and persona orders of one system share; equals `system` where nothing tells them
            apart.
        split: from the file's name; None where it tells none.
        numbered: the file names no dialogues, so that each row is one, called by its number.
        missing: optional keys that the file does not have.
    """

    system: str
    group: str
    split: str | None
    path: Path
    sha256: str
    replies: list[Reply]
    numbered: bool
    missing: list[str] = field(default_factory=list)

    @property
    def order(self) -> int:
        """Of the persona's sentences, by the file's name; 0 is the order as given."""
        return order_in_name(split_and_system(self.path)[1])[1]

    @property
    def unordered(self) -> str:
        """What files of this system in several orders share in their names."""
        return order_in_name(split_and_system(self.path)[1])[0]


def read_generations(path: Path) -> Generations:
    """Reads and checks one file.

    Args:
        path: JSON lines in UTF-8; `reference` and `response` are required, the rest of `Reply` is optional. `history`
            holds {"speaker", "text"} objects, or plain strings of which the last one is the partner's.

    Raises:
        KestrelError: names the file and the line of each problem, ten at most.
    """
    problems: list[tuple[int, str]] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    for line, text in _lines(path):
        try:
            row = json.loads(text)
            if "\\u" in text:  # JSON can spell half of a surrogate pair, which no file can hold
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            problems.append((line, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"))
            continue
        except (ValueError, RecursionError) as error:
            problems.append((line, f"not JSON ({error})"))
            continue
        if isinstance(row, dict):
            rows.append((line, row))
        else:
            problems.append((line, f"expected an object with reference and response, found {_kind(row)}"))
    if not rows and not problems:
        raise KestrelError(f"{path} holds no row; a generation file has one JSON object a reply and line")
    present = {key for _, row in rows for key in row if row[key] is not None}
    numbered = "dialogue_id" not in present
    replies: list[Reply] = []
    seen: dict[tuple[str, int], int] = {}
    turns_before: Counter[str] = Counter()
    for number, (line, row) in enumerate(rows, start=1):
        found: list[str] = [
            f"{key} is missing, other rows have it"
            for key in OPTIONAL
            if key in present and row.get(key) is None and key != "candidate_nll"  # not every reply has candidates
        ]
        if "turn" in present and row.get("turn") is None:
            found.append("turn is missing, other rows have it")
        reply = _reply(row, line, number, found.append)
        if "turn" not in present:
            # Replies of a dialogue stand in order; without the index into its turns the running number is one.
            reply = replace(reply, turn=turns_before[reply.dialogue_id])
            turns_before[reply.dialogue_id] += 1
        if (reply.reference_nll is None) != (reply.reference_tokens is None):
            found.append("reference_nll and reference_tokens belong together")
        if not found and reply.key in seen:
            found.append(f"dialogue {reply.dialogue_id!r}, turn {reply.turn} stands in line {seen[reply.key]} already")
        seen.setdefault(reply.key, line)
        problems += [(line, problem) for problem in found]
        replies.append(reply)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = [f"{path}:{line}: {problem}" for line, problem in sorted(problems)[:_MOST_PROBLEMS]]
        shown += [f"... and {more} more"] if more > 0 else []
        raise KestrelError("generations cannot be scored; mend the file or leave it out\n  " + "\n  ".join(shown))
    split, system = split_and_system(path)
    unordered, _ = order_in_name(system)
    seeds = _SEED_SUFFIX.match(unordered)
    return Generations(
        system=system,
        group=seeds["group"] if seeds else unordered,
        split=split,
        path=path,
        sha256=sha256_of(path),
        replies=replies,
        numbered=numbered,
        missing=[key for key in OPTIONAL if key not in present],
    )


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


def _kind(value: Any) -> str:
    names = {"str": "text", "dict": "an object", "list": "a list", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, f"the number {value}")


def _reply(row: dict[str, Any], line: int, number: int, complain: Callable[[str], None]) -> Reply:
    """One row, checked value by value; what is wrong goes to `complain`."""

    def text(key: str) -> str:
        if key not in row:
            complain(f"{key} is missing")
        elif not isinstance(row[key], str):
            complain(f"{key}: expected text, found {_kind(row[key])}")
        else:
            return one_line(row[key])
        return ""

    def number_of(value: Any, name: str, whole: bool, least: float) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            complain(f"{name}: expected {'an integer' if whole else 'a number'}, found {_kind(value)}")
        elif not math.isfinite(value) or value < least:
            complain(f"{name} is {value}, expected {'at least ' + str(int(least)) if least else 'a finite value >= 0'}")
        else:
            return value
        return least

    def optional(key: str, whole: bool, least: float) -> Any:
        return None if row.get(key) is None else number_of(row[key], key, whole, least)

    reference = text("reference")
    if isinstance(row.get("reference"), str) and not reference.strip():
        complain("reference is empty; a reply without a reference cannot be scored")
    dialogue_id = row.get("dialogue_id")
    if isinstance(dialogue_id, bool) or not isinstance(dialogue_id, (str, int, type(None))):
        complain(f"dialogue_id: expected text, found {_kind(dialogue_id)}")
    stopped_by = row.get("stopped_by")
    if stopped_by is not None and stopped_by not in STOPPED_BY:
        complain(f"stopped_by: expected one of {', '.join(STOPPED_BY)}, found {stopped_by!r}")
    candidates = row.get("candidate_nll")
    if candidates is not None:
        if isinstance(candidates, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in candidates):
            candidates = tuple(
                (number_of(pair[0], f"candidate_nll[{i}]", False, 0), number_of(pair[1], f"its tokens [{i}]", True, 1))
                for i, pair in enumerate(candidates)
            )
        else:
            complain("candidate_nll: expected a list of [nll, tokens]")
            candidates = None
    return Reply(
        dialogue_id=f"row {number}" if dialogue_id is None else str(dialogue_id),
        turn=optional("turn", True, 0) or 0,
        reference=reference,
        response=text("response"),
        line=line,
        persona=_persona(row.get("persona"), complain),
        history=_history(row.get("history"), complain),
        stopped_by=stopped_by,
        response_tokens=optional("response_tokens", True, 0),
        reference_nll=optional("reference_nll", False, 0),
        reference_tokens=optional("reference_tokens", True, 1),
        candidate_nll=candidates,
    )


def one_line(text: str) -> str:
    """Line breaks as spaces: tools that score files take a reply to be a line, and so do we."""
    return re.sub(r"\r\n|\r|\n", " ", text)


def _persona(value: Any, complain: Callable[[str], None]) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(sentence, str) for sentence in value):
        return tuple(one_line(sentence) for sentence in value)
    complain("persona: expected a list of sentences")
    return None


def _history(value: Any, complain: Callable[[str], None]) -> tuple[Turn, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        complain(f"history: expected a list of turns, found {_kind(value)}")
        return None
    turns: list[Turn] = []
    for index, turn in enumerate(value):
        if isinstance(turn, str):
            partners = (len(value) - 1 - index) % 2 == 0
            turns.append(Turn("partner" if partners else "self", one_line(turn)))
        elif (
            isinstance(turn, dict) and turn.get("speaker") in ("partner", "self") and isinstance(turn.get("text"), str)
        ):
            turns.append(Turn(turn["speaker"], one_line(turn["text"])))
        else:
            complain(f"history[{index}]: expected text, or an object with speaker (partner or self) and text")
            return None
    return tuple(turns)
