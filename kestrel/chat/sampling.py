"""How answers are made, changed in the middle of a conversation, by the rules of the settings."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kestrel.config.keys import all_keys, as_yaml
from kestrel.config.settings import Generation
from kestrel.config.yaml_file import load_with_lines
from kestrel.errors import KestrelError, UsageError

_OF_SAMPLING = ("temperature", "top_p", "top_k")
_OF_BEAMS = ("num_beams", "length_penalty")
SETTABLE = ("do_sample", *_OF_SAMPLING, "max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", *_OF_BEAMS)


def changed(chosen: Generation, name: str, given: str, most_new_tokens: int) -> Generation:
    """The settings with another value for one of them.

    Sampling and beams exclude each other. Here the last word counts: what belongs to one ends the other.

    Args:
        chosen: what holds so far.
        name: of the setting, without `generation.`.
        given: its value, as YAML.
        most_new_tokens: longest answer that the model's context has room for.

    Raises:
        KestrelError: no such setting, or no such value.
    """
    name = name.removeprefix("generation.")
    if name not in SETTABLE:
        raise KestrelError(f"{name} is nothing that can be set here; {', '.join(SETTABLE)} are")
    key = all_keys()[f"generation.{name}"]
    try:
        value = load_with_lines(given, name).value
        update: dict[str, Any] = {name: value}
        if name in _OF_SAMPLING and value is not None:
            update["do_sample"] = True
        beams = (name == "num_beams" and value != 1) or (name == "length_penalty" and value is not None)
        if beams or (name == "do_sample" and value is False):
            update |= {"do_sample": False, **dict.fromkeys(_OF_SAMPLING)}
        elif update.get("do_sample") or name == "num_beams":
            update |= {"num_beams": 1, "length_penalty": None}
        found = Generation.model_validate({**chosen.model_dump(), **update})
    except UsageError:
        raise KestrelError(f"{name}: expected {key.type_name}, found {given!r}") from None
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise KestrelError(f"{name}: {problem[0].lower()}{problem[1:]}, found {given!r}") from None
    if found.length_penalty is not None and found.num_beams == 1:
        raise KestrelError("length_penalty has no effect without num_beams above 1")
    if found.max_new_tokens > most_new_tokens:
        raise KestrelError(f"max_new_tokens: behind a prompt the model's context has room for {most_new_tokens}")
    return found


def described(chosen: Generation) -> str:
    """What holds, a setting a line; those that do nothing are left out."""
    skipped: tuple[str, ...] = () if chosen.do_sample else _OF_SAMPLING
    skipped += _OF_BEAMS if chosen.num_beams == 1 else ("do_sample",)
    return "\n".join(f"  {name}: {as_yaml(getattr(chosen, name))}" for name in SETTABLE if name not in skipped)
