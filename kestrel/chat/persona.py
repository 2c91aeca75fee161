"""Where the persona of a conversation comes from: the command line, a text file, or a dialogue of the data set."""

from __future__ import annotations

from pathlib import Path

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt


def persona_from_option(values: list[str]) -> tuple[str, ...]:
    """The sentences of --persona, or of the file that it names.

    Raises:
        KestrelError: the file cannot be read, or nothing is left without blanks.
    """
    one_word = len(values) == 1 and len(values[0].split()) == 1
    if one_word or Path(values[0]).is_file():
        return read_persona(Path(values[0]))
    return split_sentences(values, "--persona")


def persona_of_dialogue(settings: Settings, prompt: Prompt, dialogue_id: str | None, again: str) -> tuple[str, ...]:
    """The persona of a dialogue in generation.split; of its first one if no id is given.

    Raises:
        KestrelError: no data set, one for another prompt, or no such dialogue.
    """
    from kestrel.data.dataset import load_split, open_dataset

    remedy, split = f"python preprocess.py {again}", settings.generation.split
    try:
        folder, _ = open_dataset(settings, prompt, remedy)
        rows = load_split(folder, split, remedy)
    except KestrelError as error:
        raise KestrelError(f"{error}\n  or give a persona: --persona FILE") from None
    ids = list(rows["dialogue_id"])
    if dialogue_id is None:
        return tuple(rows[0]["persona"])
    if dialogue_id not in ids:
        raise KestrelError(f"--dialogue: {split} has no {dialogue_id!r}; its ids are {', '.join(ids[:3])} …")
    return tuple(rows[ids.index(dialogue_id)]["persona"])


def read_persona(path: Path) -> tuple[str, ...]:
    """The sentences of a persona from a text file, one a line.

    Raises:
        KestrelError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise KestrelError(f"{path}: {reason}; a persona is a UTF-8 text file with one sentence a line") from None
    return split_sentences(text.splitlines(), str(path))


def split_sentences(lines: list[str], where: str) -> tuple[str, ...]:
    """The lines that are not blank, with single spaces.

    Raises:
        KestrelError: all are blank.
    """
    sentences = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not sentences:
        raise KestrelError(f"{where}: a persona needs at least one sentence")
    return sentences
