"""Aligns several generation files, so that one table compares the same replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kestrel.errors import KestrelError
from kestrel.evaluation.generations import Generations
from kestrel.evaluation.scoring import file_name
from kestrel.evaluation.trivial_systems import TRIVIAL


def align(files: Sequence[Generations]) -> tuple[list[Generations], list[str]]:
    """Brings several files to the same replies in the order of the first; files with the persona as given come first.

    Returns:
        The files, each with the replies that all of them have, under unique names; and what the reader of the scores
        must know: replies left out, files that are the same.

    Raises:
        KestrelError: the files are of different splits, their references differ, or they share no reply.
    """
    first, *others = [file for file in files if file.split is not None] or files
    for file in others:
        if file.split != first.split:
            raise KestrelError(
                f"{file.path} is of split {file.split}, {first.path} of split {first.split}; score one split at a time"
            )
    notes: list[str] = []
    files = _without_copies(sorted(files, key=lambda file: file.order), notes)
    _make_names_unique(files)
    if len({file.numbered for file in files}) > 1:
        _take_keys(files)
    tables = [{reply.key: reply for reply in file.replies} for file in files]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise KestrelError(f"{files[0].path} and the other files share no (dialogue_id, turn); nothing can be compared")
    for file, table in zip(files, tables, strict=True):
        for one, two in ((tables[0][key], table[key]) for key in shared):
            if one.references != two.references:
                raise KestrelError(
                    f"references differ: {files[0].path}:{one.line} has {one.reference!r}, {file.path}:{two.line} has "
                    f"{two.reference!r}; scores against different references cannot be compared"
                )
        if len(table) > len(shared):
            notes.append(
                f"WARNING: the files do not cover the same replies. Of {file.system}, {len(table) - len(shared):,} of "
                f"{len(table):,} replies are left out; everything below is on the {len(shared):,} that all files have."
            )
        file.replies = [table[key] for key in shared]
    return files, notes


def _without_copies(files: Sequence[Generations], notes: list[str]) -> list[Generations]:
    """Two runs with one base write its file twice; it is one system."""
    kept: dict[tuple[str, str], Generations] = {}
    for file in files:
        same = kept.setdefault((file.sha256, file.system), file)
        if same is not file:
            notes.append(f"{file.path} is the same as {same.path} and is scored once.")
    return list(kept.values())


def _make_names_unique(files: Sequence[Generations]) -> None:
    """Files of one system from several run folders become SYSTEM@RUN, and no two have one file of responses."""
    several = {name for name, count in Counter(file.system for file in files).items() if count > 1}
    taken = {*map(file_name, (*TRIVIAL, "gold"))}  # rows that the table adds
    for file in files:
        if file.system in several:
            folder = file.path.resolve().parent
            run = folder.parent.name if folder.name == "generations" else folder.name
            file.system = f"{file.system}@{run}"
        name, number = file.system, 2
        while file_name(file.system) in taken:
            file.system, number = f"{name}#{number}", number + 1
        taken.add(file_name(file.system))


def _take_keys(files: Sequence[Generations]) -> None:
    """Files without dialogue_id take dialogues and turns, line by line, from the first file that has them."""
    source = next(file for file in files if not file.numbered)
    for file in (file for file in files if file.numbered):
        if len(file.replies) != len(source.replies):
            raise KestrelError(
                f"{file.path} has {len(file.replies):,} rows and no dialogue_id, {source.path} has "
                f"{len(source.replies):,}; without ids both need the same replies in the same order"
            )
        file.replies = [
            replace(reply, dialogue_id=named.dialogue_id, turn=named.turn)
            for reply, named in zip(file.replies, source.replies, strict=True)
        ]
        file.missing = tuple(key for key in file.missing if key != "dialogue_id")
