"""YAML with the line of every key, numbers such as 2e-4, and no silent duplicates."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import yaml

from kestrel.errors import UsageError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader. It follows YAML 1.1, for which 2e-4 is text; 1.2 and everybody else say number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


@dataclass
class Loaded:
    """A document: its value, the line of each dotted key (1-based), and problems such as duplicate keys."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def load_with_lines(text: str, name: str, text_keys: Collection[str] = ()) -> Loaded:
    """Reads one YAML document.

    Args:
        text: the document.
        name: file name for messages.
        text_keys: dotted keys whose scalars are taken as written, never as numbers or booleans.

    Raises:
        UsageError: not YAML; with file and line.
    """
    loader = _Loader(text)
    try:
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
        raise UsageError([f"{name}: not valid YAML: {error}"]) from None
    finally:
        loader.dispose()


def _construct(loader: _Loader, node: Any, dotted: str, name: str, text_keys: frozenset[str], loaded: Loaded) -> Any:
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
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
    return loader.construct_object(node, deep=True)
