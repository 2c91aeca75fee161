"""Reads generation files, ours or another tool's: one JSON object per line and reply."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, overload

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from kestrel.dialogue import Turn
from kestrel.errors import KestrelError
from kestrel.evaluation.reading import Problems, raw_rows
from kestrel.generation.files import order_in_name, split_and_system
from kestrel.runtime.manifest import sha256_of

_MOST_PROBLEMS = 10
_SEED_SUFFIX = re.compile(r"^(?P<group>.+?)[._-]?seed[._-]?\d+$")


def without_seed(name: str) -> str:
    """The name of a system or a run without `seedN` at its end."""
    seed = _SEED_SUFFIX.match(name)
    return seed["group"] if seed else name


def one_line(text: str) -> str:
    """Line breaks as spaces: tools that score files take a reply to be a line, and so do we."""
    return re.sub(r"\r\n|\r|\n", " ", text)


_ROLES = {"user": "partner", "human": "partner", "assistant": "self", "bot": "self", "gpt": "self"}


def _as_turns(history: Any) -> Any:
    """Turns as pydantic reads them, also those of chat messages. Of plain strings the last one is the partner's."""
    if not isinstance(history, list):
        return history
    turns: list[Any] = []
    for later, turn in enumerate(reversed(history)):
        if isinstance(turn, str):
            turn = {"speaker": "self" if later % 2 else "partner", "text": turn}
        known = turn if isinstance(turn, dict) else {}
        speaker = known.get("speaker", known.get("role"))
        turns.append({"speaker": _ROLES.get(str(speaker), speaker), "text": known.get("text", known.get("content"))})
    return turns[::-1]


class Likelihoods(Sequence[tuple[float, int]]):
    """Pairs of an NLL and a number of tokens in a quarter of the memory of tuples: a reply has up to twenty of them."""

    __slots__ = ("_flat",)

    def __init__(self, pairs: Sequence[tuple[float, int]]) -> None:
        self._flat = array("d", chain.from_iterable(pairs))

    def __len__(self) -> int:
        return len(self._flat) // 2

    @overload
    def __getitem__(self, place: int) -> tuple[float, int]: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[tuple[float, int], ...]: ...

    def __getitem__(self, place: int | slice) -> Any:
        return tuple(self)[place]

    def __iter__(self) -> Iterator[tuple[float, int]]:
        return zip(self._flat[::2], map(int, self._flat[1::2]), strict=True)


Line = Annotated[str, AfterValidator(one_line)]
Count = Annotated[int, Field(strict=True, ge=0)]
Tokens = Annotated[int, Field(strict=True, ge=1)]
Nll = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
History = Annotated[
    tuple[Turn, ...],
    BeforeValidator(_as_turns),
    AfterValidator(lambda turns: tuple(turn._replace(text=one_line(turn.text)) for turn in turns)),
]


@dataclass(frozen=True, slots=True)
class Reply:
    """One row: what a system answered at one turn of a dialogue, and what the person had answered.

    The types are also what pydantic checks when a file is read.

    Attributes:
        dialogue_id, turn: which reply; `turn` is the index into the dialogue's turns.
        reference, response: one line each; line breaks in the file have become spaces.
        line: of the row in its file, from 1.
        history: the turns before, oldest first.
        reference_nll: negative log-likelihood of the reference, summed over its `reference_tokens` tokens, in nats.
        other_persona_nll: NLL of the reference, in nats, under personas of other dialogues.
        nli: for each sentence of the persona, 1 where the response entails it, -1 where it contradicts it, else 0.
        other_references: what else would have been right; the likelihood is that of `reference`.
        candidate_nll: (NLL in nats, tokens) of each distractor, in the dataset's order, without the reference.
    """

    dialogue_id: Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
    turn: Count
    reference: Line
    response: Line
    line: int
    persona: tuple[Line, ...] | None = None
    history: History | None = None
    stopped_by: Literal["eos", "length", "stop_string"] | None = None
    response_tokens: Count | None = None
    reference_nll: Nll | None = None
    reference_tokens: Tokens | None = None
    other_persona_nll: Annotated[tuple[Nll, ...] | None, AfterValidator(lambda values: values or None)] = None
    nli: tuple[Literal[-1, 0, 1], ...] | None = None
    candidate_nll: Annotated[
        Sequence[tuple[Nll, Tokens]] | None, AfterValidator(lambda pairs: Likelihoods(pairs) if pairs else None)
    ] = None
    other_references: tuple[Line, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        return self.dialogue_id, self.turn

    @property
    def references(self) -> tuple[str, ...]:
        return (self.reference, *self.other_references)

    def with_response(self, response: str) -> Reply:
        """The same context and references with a response that no model gave."""
        return Reply(
            self.dialogue_id, self.turn, self.reference, response, self.line, self.persona, self.history,
            other_references=self.other_references,
        )  # fmt: skip


_ROW = TypeAdapter(Reply)
# What a row may leave out, and what generate.py or an NLI model adds on request, which is not missed.
_ON_REQUEST = ("other_persona_nll", "nli")
_OTHERS = ("turn", "reference", "response", "line", "other_references")
OPTIONAL = tuple(f.name for f in fields(Reply) if f.name not in (*_OTHERS, *_ON_REQUEST))


@dataclass
class Generations:
    """The replies of one system on one split, in the order of the file.

    Attributes:
        split: from the file's name; None where it names none.
        missing: keys of `OPTIONAL` that the file does not have.
    """

    system: str
    split: str | None
    path: Path
    sha256: str
    replies: list[Reply]
    missing: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """The file names no dialogues, so that each row is one, called by its number."""
        return "dialogue_id" in self.missing

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
        return without_seed(self.name_without_order)

    @property
    def seed_group(self) -> str:
        """The same, of one run where several runs have this system: SYSTEM@RUN without the run's seed."""
        _, several, run = self.system.partition("@")
        return f"{self.group}@{without_seed(run)}" if several else self.group


def read_generations(path: Path, fields_given: Sequence[str] = ()) -> Generations:
    """Reads and checks one file.

    Args:
        path: JSON lines in UTF-8, or another form that `reading` knows. A reference and a response are required, `turn`
            and `OPTIONAL` are not. `history` holds {"speaker", "text"} objects, or plain strings of which the last one
            is the partner's.
        fields_given: `evaluation.fields`.

    Raises:
        KestrelError: names the file and the line of each problem, ten at most.
    """
    problems: Problems = []
    rows, by_line = raw_rows(path, fields_given, problems)
    replies, missing = _checked_replies(rows, problems)
    if problems:
        shown = [
            f"{path}{f':{at}' if by_line else f': row {at}'}: {problem}"
            for at, problem in sorted(problems)[:_MOST_PROBLEMS]
        ]
        if len(problems) > _MOST_PROBLEMS:
            shown.append(f"... and {len(problems) - _MOST_PROBLEMS} more")
        raise KestrelError("generations cannot be scored; fix the file or leave it out\n  " + "\n  ".join(shown))
    if not replies:
        raise KestrelError(f"{path} has no rows; a generation file has one JSON object per line and reply")
    split, system = split_and_system(path)
    return Generations(system, split, path, sha256_of(path), replies, missing)


def _checked_replies(
    rows: Iterable[tuple[int, dict[str, Any]]], problems: Problems
) -> tuple[list[Reply], tuple[str, ...]]:
    """The replies, each with a key of its own, and the keys of `OPTIONAL` that none has. What is wrong goes to `problems`."""
    replies: list[Reply] = []
    lines: list[int] = []
    lacking: dict[str, list[int]] = {key: [] for key in (*OPTIONAL, "turn")}  # lines of the rows without the key
    first_lines: dict[tuple[str, int], int] = {}
    turns_before: Counter[str] = Counter()
    previous: Reply | None = None
    for number, (line, row) in enumerate(rows, start=1):
        lines.append(line)
        for key in lacking.keys() - row.keys():
            lacking[key].append(line)
        if ("reference_nll" in row) != ("reference_tokens" in row):
            problems.append((line, "reference_nll and reference_tokens belong together"))
        try:
            reply = _ROW.validate_python({"dialogue_id": f"row {number}", "turn": 0} | row | {"line": line})
        except ValidationError as error:
            problems += [
                (line, f"{'.'.join(map(str, e['loc']))}: {e['msg'].replace('tuple', 'list')}") for e in error.errors()
            ]
            continue
        if not all(text.strip() for text in reply.references):
            problems.append((line, "reference is empty; a reply without a reference cannot be scored"))
        if "turn" not in row:
            # Replies of a dialogue follow each other, and its partner begins: without the index into its turns, count them.
            reply = replace(reply, turn=2 * turns_before[reply.dialogue_id] + 1)
            turns_before[reply.dialogue_id] += 1
        if "dialogue_id" in row and first_lines.setdefault(reply.key, line) != line:
            problems.append(
                (line, f"dialogue {reply.dialogue_id!r}, turn {reply.turn} is in line {first_lines[reply.key]} already")
            )
        if previous is not None:
            _share_context(previous, reply)
        replies.append(reply)
        previous = reply
    # A file has a key in every row or in none, but for candidates, which a corpus may offer for some replies only.
    for key, without in lacking.items():
        if 0 < len(without) < len(lines) and key != "candidate_nll":
            problems += [(line, f"{key} is missing, other rows have it") for line in without]
    return replies, tuple(key for key in OPTIONAL if len(lacking[key]) == len(lines))


def _share_context(previous: Reply, reply: Reply) -> None:
    """Lets a reply hold what the one before holds where they are equal: a file repeats dialogue and persona in each row."""
    if previous.dialogue_id == reply.dialogue_id:
        object.__setattr__(reply, "dialogue_id", previous.dialogue_id)
    if previous.persona == reply.persona:
        object.__setattr__(reply, "persona", previous.persona)
    if previous.history and reply.history:
        shared = [a for a, b in zip(previous.history, reply.history, strict=False) if a == b]
        if shared and len(shared) == min(len(previous.history), len(reply.history)):
            object.__setattr__(reply, "history", (*shared, *reply.history[len(shared) :]))
