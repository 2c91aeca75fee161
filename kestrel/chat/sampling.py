"""Changes the generation settings during a conversation, by the same rules as the command line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from kestrel.config.keys import all_keys, as_yaml
from kestrel.config.settings import Generation
from kestrel.config.yaml_file import load_with_lines
from kestrel.errors import KestrelError, UsageError

_SAMPLING = ("temperature", "top_p", "top_k")
_BEAMS = ("num_beams", "length_penalty")
DEFAULTS = {"temperature": 0.7, "top_p": 0.9}  # of sampling in a conversation
SETTABLE = ("do_sample", *_SAMPLING, "max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", *_BEAMS)


def chat_settings(settings: Generation, given: Collection[str]) -> Generation:
    """The settings to talk with: sampled answers, unless the experiment or the command line says how to decode.

    Args:
        given: the keys that were given on the command line.
    """
    decides = {f"generation.{name}" for name in ("do_sample", *_SAMPLING, *_BEAMS)}
    if settings.do_sample or settings.num_beams > 1 or decides & set(given):
        return settings
    return settings.model_copy(update={"do_sample": True, **DEFAULTS})


def change_setting(current: Generation, name: str, text: str, most_new_tokens: int) -> Generation:
    """The settings with a new value for one of them.

    Sampling and beams exclude each other: a setting of one switches the other off.

    Args:
        name: with or without `generation.`.
        text: the new value, as YAML.
        most_new_tokens: the longest answer that fits the model's context.

    Raises:
        KestrelError: the setting does not exist, or the value is not allowed.
    """
    name = name.removeprefix("generation.")
    if name not in SETTABLE:
        raise KestrelError(f"{name} cannot be set here; these can: {', '.join(SETTABLE)}")
    try:
        value = load_with_lines(text, name).value if text else None
        update: dict[str, Any] = {name: value}
        if name == "do_sample" and value is True and current.temperature is None:
            update |= DEFAULTS
        if name in _SAMPLING and value is not None:
            update["do_sample"] = True
        uses_beams = (name == "num_beams" and value != 1) or (name == "length_penalty" and value is not None)
        if uses_beams or (name == "do_sample" and value is False):
            update |= {"do_sample": False, **dict.fromkeys(_SAMPLING)}
        elif update.get("do_sample") or name == "num_beams":
            update |= {"num_beams": 1, "length_penalty": None}
        changed = Generation.model_validate({**current.model_dump(), **update})
    except UsageError:
        type_name = all_keys()[f"generation.{name}"].type_name
        raise KestrelError(f"{name}: expected {type_name}, found {text!r}") from None
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise KestrelError(f"{name}: {problem[0].lower()}{problem[1:]}, found {text!r}") from None
    if changed.length_penalty is not None and changed.num_beams == 1:
        raise KestrelError("length_penalty has no effect without num_beams above 1")
    if changed.max_new_tokens > most_new_tokens:
        raise KestrelError(f"max_new_tokens: at most {most_new_tokens} fit into the model's context after a prompt")
    return changed


def settings_in_effect(settings: Generation) -> str:
    """A line for each setting; those without effect are left out."""
    without_effect: tuple[str, ...] = () if settings.do_sample else _SAMPLING
    without_effect += _BEAMS if settings.num_beams == 1 else ("do_sample",)
    return "\n".join(f"  {name}: {as_yaml(getattr(settings, name))}" for name in SETTABLE if name not in without_effect)


def decoding_of(settings: Generation) -> str:
    """How answers are decoded, in words."""
    chosen = [f"{name} {getattr(settings, name)}" for name in _SAMPLING if getattr(settings, name) is not None]
    how = ", ".join(["sampled", *chosen]) if settings.do_sample else "the likeliest tokens"
    beams = f" of {settings.num_beams} beams" if settings.num_beams > 1 else ""
    return f"{how}{beams}, at most {settings.max_new_tokens} tokens"
