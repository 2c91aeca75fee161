"""YAML with the line of every key, numbers as people write them, and no silent duplicates."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import yaml

from kestrel.errors import UsageError

_MOST_VALUES = 10_000  # an experiment has a hundred; references to references can make billions of a few lines


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with numbers as YAML 1.2 has them.

    It follows YAML 1.1, for which 2e-4 is text, 010 is eight, 1:30 is ninety and 2024-01-01 is a date.
    """

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Counts, so that a large file is refused before all of it is read."""
        self.nodes += 1
        if self.nodes > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES:,} keys and values; this is no experiment")
        return super().compose_node(parent, index)


def _rule(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_rule("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789")
_rule(
    "float",
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
    "-+.0123456789",
)


class Dumper(yaml.SafeDumper):
    """Puts quotes around text that our loader, or one that follows YAML 1.1, would take for something else."""


for _first, _rules in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _rules:
        Dumper.add_implicit_resolver(_tag, _pattern, [_first])


@dataclass
class Loaded:
    """A document: its value, the line of each dotted key (1-based), and problems such as duplicate keys."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    values: int = 0


def load_with_lines(text: str, name: str, text_keys: Collection[str] = ()) -> Loaded:
    """Reads one YAML document.

    Args:
        text: the document.
        name: file name for messages.
        text_keys: dotted keys whose scalars are taken as written, never as numbers or booleans.

    Raises:
        UsageError: not YAML; with file and line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        loaded = Loaded(None)
        if node is not None:
            loaded.value = _construct(loader, node, "", name, frozenset(text_keys), loaded)
        return loaded
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError([f"{name}{line}: not valid YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError([f"{name}: not valid YAML: {reason}"]) from None


def _construct(loader: _Loader, node: Any, dotted: str, name: str, text_keys: frozenset[str], loaded: Loaded) -> Any:
    loaded.values += 1
    if loaded.values > _MOST_VALUES:
        raise UsageError([f"{name}: more than {_MOST_VALUES:,} values; this is no experiment"])
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                loaded.problems.append(f"{name}:{line}: a key must be a word, not a list or mapping")
                continue
            key = str(key_node.value)
            path = f"{dotted}.{key}" if dotted else key
            if path in loaded.lines:
                loaded.problems.append(f"{name}:{line}: {path}: given twice, first in line {loaded.lines[path]}")
                continue
            loaded.lines[path] = line
            result[key] = _construct(loader, value_node, path, name, text_keys, loaded)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, f"{dotted}.{i}", name, text_keys, loaded) for i, item in enumerate(node.value)]
    if dotted in text_keys and node.tag != "tag:yaml.org,2002:null":
        return node.value
    try:
        return loader.construct_object(node, deep=True)
    # What PyYAML (6.0.3) raises where a tag and its text do not fit: `!!int ''`, `!!bool 3`, `!!timestamp x`.
    except (IndexError, KeyError, AttributeError, TypeError, OverflowError):
        raise UsageError([f"{name}:{node.start_mark.line + 1}: not valid YAML: this is no {node.tag}"]) from None
