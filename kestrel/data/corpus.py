"""A source of dialogues: found, recognized, and read by the module of its format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kestrel.config.settings import Data
from kestrel.data.formats.recognize import FORMATS, recognize
from kestrel.data.locate import locate
from kestrel.data.raw import RawDialogue, SourceFile
from kestrel.data.read_counts import ReadCounts
from kestrel.errors import KestrelError
from kestrel.runtime.manifest import sha256_of

_MESSENGERS = ("whatsapp", "telegram", "discord", "messenger")
_OF_SOME_FORMATS = {"self": _MESSENGERS, "session_gap": _MESSENGERS, "earlier_sessions": ("msc",)}


@dataclass(frozen=True)
class Corpus:
    """Dialogues of one source.

    Attributes:
        format: a key of `FORMATS`.
        settings: what the user wants of it.
        paths: the local files that it is read from (for a hub set: in the Hub's cache).
        fingerprint: file name -> sha256; for a hub set also "hub id" and "hub revision" (the commit).
        files: split -> its files; the splits are among train, validation, test, in this order, always with train.
    """

    source: str
    format: str
    settings: Data
    paths: list[Path]
    fingerprint: dict[str, str]
    files: dict[str, list[SourceFile]]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def raw_dialogues(self, split: str, counts: ReadCounts) -> Iterator[RawDialogue]:
        """What the reader of the format finds, before repair."""
        names: Counter[str] = Counter()
        for left, file in enumerate(self.files[split], 1 - len(self.files[split])):
            yield from FORMATS[self.format].read(replace(file, counts=counts, names=names, is_last=left == 0))


def open_corpus(settings: Data) -> Corpus:
    """Finds and recognizes a source; reads no more of it than that takes, and its sha256.

    Raises:
        KestrelError: no such source, not reachable, of no known format, or not of the one named.
    """
    located = locate(settings.source, settings.revision)
    files: dict[str, list[SourceFile]] = {}
    for split, parts in located.files.items():
        for number, part in enumerate(parts):
            prefix = split if len(parts) == 1 else f"{split}.{number}"
            files.setdefault(split, []).append(replace(part, id_prefix=prefix, settings=settings))
    formats = {file.path: recognize(file, settings.format) for parts in files.values() for file in parts}
    if len(set(formats.values())) > 1:
        found = ", ".join(f"{path.name} is {name}" for path, name in [*formats.items()][:6])
        raise KestrelError(f"{settings.source}: the files are of different formats: {found}.")
    hashes = {path.relative_to(located.root).as_posix(): sha256_of(path) for path in formats}
    format = next(iter(formats.values()))
    return Corpus(settings.source, format, settings, list(formats), located.hub_commit | hashes, files)


def unused_settings(corpus: Corpus) -> list[str]:
    """A sentence for each setting that is for sources of another format."""
    return [
        f"data.{key} was not used: it is for {', '.join(formats)}, and the source is {corpus.format}"
        for key, formats in _OF_SOME_FORMATS.items()
        if getattr(corpus.settings, key) != Data.model_fields[key].default and corpus.format not in formats
    ]
