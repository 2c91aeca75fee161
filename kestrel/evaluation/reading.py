"""Other tools' outputs as rows of our form: JSON lines, arrays and objects, other keys, ParlAI's world logs, text lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from kestrel.errors import KestrelError

Problems = list[tuple[int, str]]  # (line or number of the row, what is wrong)
Rows = Iterator[tuple[int, dict[str, Any]]]
# What else a key of ours is called, where the name leaves no doubt.
ALIASES: dict[str, tuple[str, ...]] = {
    "response": (
        "prediction", "predictions", "predicted", "pred", "hypothesis", "hyp", "output", "model_output", "generated",
        "generation", "generated_text", "generated_response", "model_response", "system_output", "original_response",
    ),
    "reference": (
        "references", "label", "labels", "eval_labels", "target", "targets", "gold", "gold_response", "gold_reply",
        "ground_truth", "expected", "ref", "refs",
    ),
    "dialogue_id": ("dialog_id", "conversation_id", "conv_id", "episode_id", "session_id", "id"),
    "persona": ("personas", "your_persona", "self_persona", "profile", "intervening_persona"),
    "history": ("context", "dialogue_history", "dialog_history", "conversation"),
}  # fmt: skip
_TABLES = (".csv", ".tsv", ".xlsx", ".parquet")
_HEAD = 100  # rows whose keys decide which key is which
_OF_A_ROW = {"dialog", "response", "reference", *ALIASES["response"], *ALIASES["reference"]}
_PERSONA = re.compile(r"your persona: *(.*)")


def raw_rows(path: Path, fields: Sequence[str], problems: Problems) -> tuple[Rows, bool]:
    """Objects without their nulls, under our keys, with their line; what holds no object goes to `problems`.

    Args:
        fields: of `evaluation.fields`, such as response=text.

    Returns:
        The rows, and whether their numbers are lines of the file; else they count the rows from 1.

    Raises:
        KestrelError: the file cannot be read, or no key or several could be what a row needs.
    """
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
            is_one_line = not any(line.strip() for line in file)
    except FileNotFoundError:
        raise KestrelError(f"{path} does not exist; generate.py writes it, or name another file") from None
    except IsADirectoryError:
        raise KestrelError(f"{path} is a folder; name the JSONL files in it") from None
    if first.startswith(b"version https://git-lfs"):
        raise KestrelError(f"{path} is a Git LFS pointer, not the replies; fetch the file itself with: git lfs pull")
    if ".hyp" in path.suffixes[-2:]:
        return _text_lines(path), True
    if path.suffix.lower() in _TABLES:
        raise KestrelError(
            f"{path} is a table, and generations are JSON; write a JSON object a row, as pandas does with "
            "frame.to_json(path, orient='records', lines=True)"
        )
    whole = None if _is_row(_json(first), is_one_line) else _contained(_json(path.read_bytes()))
    rows = _json_lines(path, problems) if whole is None else iter(enumerate(whole, start=1))
    head = list(islice(rows, _HEAD))
    rows = chain(head, rows)
    if head and all("dialog" in row for _, row in head):
        return _of_world_log(rows, problems), whole is None
    names = _names({key for _, row in head for key in row}, fields, path) if head else {}
    return ((number, _renamed(row, names)) for number, row in rows), whole is None


def _json(text: bytes) -> Any:
    try:
        return from_json(text.decode("utf-8-sig").strip())
    except ValueError:
        return None


def _is_row(value: Any, alone: bool) -> bool:
    """Whether a file's first line is a row; a line alone may also be an object that holds the rows."""
    return isinstance(value, dict) and not (alone and _contained(value) is not None)


def _contained(value: Any) -> list[dict[str, Any]] | None:
    """The rows in an array, in an object by their ids, or in the only list of an object; None where there are none."""
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        value = [{"dialogue_id": name} | row for name, row in value.items()]
    elif isinstance(value, dict):
        lists = {
            key: part for key, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)
        }
        is_row = (value.keys() - lists.keys()) & _OF_A_ROW
        value = next(iter(lists.values())) if len(lists) == 1 and not is_row else None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return None
    return [_without_nulls(row) for row in value]


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _json_lines(path: Path, problems: Problems) -> Rows:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                row = from_json(text) if text else {}
            except UnicodeDecodeError as error:
                problems.append((line, f"not UTF-8 text (byte {error.start} of the line)"))
            except ValueError as error:
                problems.append((line, f"not JSON ({error})"))
            else:
                if not isinstance(row, dict):
                    problems.append((line, "expected an object with reference and response"))
                elif text:
                    yield line, _without_nulls(row)


def _text_lines(path: Path) -> Rows:
    """NAME.hyp[.txt] beside NAME.ref[.txt], or NAME.ref0, NAME.ref1 and so on: a reply a line."""
    stem, ending = re.fullmatch(r"(.*)\.hyp(\.txt)?", path.name, re.DOTALL).groups()  # type: ignore[union-attr]
    pattern = re.compile(re.escape(stem) + r"\.ref\d*" + re.escape(ending or ""))
    references = sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))
    if not references:
        raise KestrelError(f"{path} needs its references beside it, one a line, in {stem}.ref{ending or ''}")
    texts = [_lines_of(file) for file in (path, *references)]
    for other, lines in zip(references, texts[1:], strict=True):
        if len(lines) != len(texts[0]):
            raise KestrelError(
                f"{path} has {len(texts[0]):,} lines and {other} {len(lines):,}; both need a line a reply"
            )
    for number, (response, *golds) in enumerate(zip(*texts, strict=True), start=1):
        yield number, {"response": response, "reference": golds[0], "other_references": golds[1:]}


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise KestrelError(f"{path}:{line}: not UTF-8 text (byte {error.start} of the file)") from None


def _of_world_log(rows: Rows, problems: Problems) -> Rows:
    """ParlAI's log of a world: exchanges of the teacher's act, which has the labels, and the model's."""
    for number, row in rows:
        history: list[dict[str, str]] = []
        persona: list[str] = []
        for place, exchange in enumerate(row["dialog"] if isinstance(row["dialog"], list) else [None]):
            acts = [act for act in exchange if isinstance(act, dict)] if isinstance(exchange, list) else []
            labels = (acts[0].get("eval_labels") or acts[0].get("labels")) if len(acts) == 2 else None
            if not isinstance(labels, list) or not labels:
                problems.append((number, f"dialog.{place}: expected an act with eval_labels and the model's answer"))
                break
            lines = str(acts[0].get("text") or "").split("\n")
            persona += [match[1] for line in lines if (match := _PERSONA.match(line))]
            said = " ".join(line for line in lines if "persona: " not in line)
            history.append({"speaker": "partner", "text": said})
            yield number, _renamed(
                {
                    "dialogue_id": f"dialogue {number}", "turn": 2 * place + 1, "persona": list(persona),
                    "history": list(history), "reference": labels, "response": acts[1].get("text"),
                },
                {},
            )  # fmt: skip
            history.append({"speaker": "self", "text": str(labels[0])})


def _names(present: set[str], fields: Sequence[str], path: Path) -> dict[str, str]:
    """Our key for each key of theirs that has another name."""
    given = {theirs: ours for ours, _, theirs in (field.partition("=") for field in fields)}
    for theirs in given:
        if theirs not in present:
            raise KestrelError(
                f"{path}: evaluation.fields names {theirs}, but its keys are {', '.join(sorted(present))}"
            )
    names = dict(given)
    for ours, aliases in ALIASES.items():
        if ours in present or ours in given.values():
            continue
        found = [alias for alias in aliases if alias in present and alias not in given]
        if len(found) > 1 and ours in ("response", "reference"):
            raise KestrelError(
                f"{path}: {' and '.join(found)} could each be the {ours}; choose one with --evaluation.fields "
                f"{ours}={found[0]}"
            )
        if found:
            names[found[0]] = ours
        elif ours in ("response", "reference"):
            raise KestrelError(
                f"{path}: no key is called {ours}; its keys are {', '.join(sorted(present)) or 'none'}. Name the one "
                f"that holds it with --evaluation.fields {ours}=KEY"
            )
    return names


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row under our keys; several references, and texts where lists are expected, in our form."""
    taken = set(names.values())
    renamed = {names.get(key, key): value for key, value in row.items() if key in names or key not in taken}
    references = renamed.get("reference")
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        renamed["reference"], renamed["other_references"] = references[0], references[1:]
    for key in ("persona", "history"):
        if isinstance(renamed.get(key), str):
            renamed[key] = [line for line in renamed[key].split("\n") if line.strip()]
    return renamed
