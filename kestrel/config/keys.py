"""The keys of the settings: names, types and defaults, for the command line, its help and its messages."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kestrel.config.settings import Settings
from kestrel.config.yaml_file import Dumper


@dataclass(frozen=True)
class Key:
    """One leaf of the settings, such as training.learning_rate."""

    dotted: str
    field: FieldInfo

    @property
    def alternatives(self) -> list[Any]:
        """The types that a value may have, each without its limits."""
        return _members(self.field.annotation)

    @property
    def takes_several(self) -> bool:
        return any(typing.get_origin(option) is list for option in self.alternatives)

    @property
    def is_text(self) -> bool:
        """Takes strings only, so that a revision such as 1234567 or 12e4567 is not read as a number."""
        return {*self.alternatives} - {type(None)} == {str}

    @property
    def type_name(self) -> str:
        return " or ".join(_type_name(option) for option in self.alternatives)

    @property
    def default(self) -> str:
        return "required" if self.field.is_required() else f"default: {as_yaml(self.field.default)}"


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for member in typing.get_args(annotation) for leaf in _members(member)]
    return [annotation]


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"list of {_type_name(_members(typing.get_args(annotation)[0])[0])}"
    if annotation is type(None):
        return "null"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true|false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def as_yaml(value: Any) -> str:
    """A value on one line, as YAML that reads back to it."""
    text = "".join(value) if isinstance(value, list) else value
    quoted = '"' if isinstance(text, str) and not text.isprintable() else None
    # Within a list, so that what would end a list's item gets quotes as well.
    style: dict[str, Any] = {
        "default_flow_style": True,
        "default_style": quoted,
        "allow_unicode": True,
        "width": math.inf,
    }
    line = yaml.dump([value], Dumper=Dumper, **style)
    return line.strip()[1:-1]


def all_keys(model: type[BaseModel] = Settings, prefix: str = "") -> dict[str, Key]:
    """Every leaf of the settings by its dotted name, in the order of the file."""
    keys: dict[str, Key] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= all_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = Key(prefix + name, field)
    return keys
