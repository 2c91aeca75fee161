"""Where the persona of a conversation comes from: the command line, a file, a name, or a dialogue of the data set."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

from kestrel.config.settings import Settings
from kestrel.data.persona_file import Persona, read_persona, sentences_of
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt
from kestrel.runtime.atomic import clear_leftovers_of, write_atomically


def persona_from_option(values: list[str]) -> Persona:
    """The sentences of --persona, or of the file or the saved persona that it names.

    Raises:
        KestrelError: the file cannot be read, more follows it, or nothing is left without blanks.
    """
    # os.path.isfile is False also of a sentence that is too long for a file name, where Path.is_file raises.
    is_file = os.path.isfile(values[0])
    if is_file and len(values) > 1:
        raise KestrelError(f"--persona: {values[0]} is a file, and more follows it; give a file or sentences")
    if len(values) == 1 and (is_file or len(values[0].split()) == 1):
        return persona_named(values[0])
    return Persona(sentences_of(values, "--persona"))


def persona_named(name: str) -> Persona:
    """A saved persona, or the one in a file.

    Raises:
        KestrelError: neither exists, or it cannot be read.
    """
    saved = _folder() / f"{name}.txt"
    return read_persona(saved if _is_name(name) and os.path.isfile(saved) else Path(os.path.expanduser(name)))


def saved_personas() -> list[str]:
    """The names of the personas that the user has saved."""
    return sorted(path.stem for path in _folder().glob("*.txt") if _is_name(path.stem))


def save_persona(name: str, persona: tuple[str, ...]) -> Path:
    """Saves a persona's sentences under a name, in place of what had that name.

    Raises:
        KestrelError: the name is no word, or the folder cannot be written.
    """
    if not _is_name(name):
        raise KestrelError(f"{name!r} is no name for a persona; use letters, digits, - and _")
    path = _folder() / f"{name}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers_of(path)
        with write_atomically(path) as file:
            file.writelines(f"{sentence}\n" for sentence in persona)
    except OSError as error:
        raise KestrelError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kestrel" / "personas"


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[\w-]{1,64}", text) is not None


def persona_of_dialogue(
    settings: Settings, prompt: Prompt, again: str, dialogue_id: str | None, draw: bool = False
) -> Persona:
    """The persona of a dialogue in generation.split; without an id of its first one, or of any.

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
        dialogue_id = random.choice(ids) if draw else ids[0]
    if dialogue_id not in ids:
        raise KestrelError(f"{split} has no dialogue {dialogue_id!r}; its ids are {', '.join(ids[:3])} …")
    return Persona(tuple(rows[ids.index(dialogue_id)]["persona"]))
