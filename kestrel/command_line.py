"""From a YAML file and options to validated settings, and from whatever happens to an exit status.

pydantic checks the values; this room adds what it does not know: the line a value stands in, the nearest valid key,
and options of the form `--section.key VALUE`. Nothing heavy is imported before the settings are known to be valid.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
import textwrap
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kestrel.errors import Interrupted, KestrelError, UsageError
from kestrel.settings import Settings, conflicts
from kestrel.yaml_lines import load_with_lines


@dataclass(frozen=True)
class Key:
    """One leaf of the settings, such as training.learning_rate."""

    dotted: str
    field: FieldInfo

    @property
    def takes_several(self) -> bool:
        return any(typing.get_origin(option) is list for option in _alternatives(self.field.annotation))

    @property
    def is_text(self) -> bool:
        """Takes strings only, so that a revision such as 1234567 or 12e4567 is not read as a number."""
        options = {option for option in _alternatives(self.field.annotation) if option is not type(None)}
        return options == {str}

    @property
    def type_name(self) -> str:
        return " or ".join(_type_name(option) for option in _alternatives(self.field.annotation))

    @property
    def default(self) -> str:
        return "required" if self.field.is_required() else f"default: {_as_yaml(self.field.default)}"


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, `Annotated` and `Literal` left as they are."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [leaf for member in typing.get_args(annotation) for leaf in _alternatives(member)]
    return [annotation]


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    if annotation is type(None):
        return "null"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true|false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def all_keys(model: type[BaseModel] = Settings, prefix: str = "") -> dict[str, Key]:
    """Every leaf of the settings by its dotted name, in the order of the file."""
    keys: dict[str, Key] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= all_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = Key(prefix + name, field)
    return keys


def _parser(name: str, doc: str, options: Sequence[tuple[str, dict[str, Any]]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        description=textwrap.dedent(doc),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118),
        usage=f"python {name} --config configs/NAME.yaml [--section.key VALUE ...] [--print-config] [--help]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--debug", action="store_true", help="show a traceback where a run fails")
    for flag, arguments in options:
        parser.add_argument(flag, **arguments)
    groups: dict[str, Any] = {}
    for key in all_keys().values():
        section = key.dotted.rpartition(".")[0]
        if section not in groups:
            description = Settings.model_fields[section].annotation.__doc__ if section else None
            groups[section] = parser.add_argument_group(section or "experiment", description)
        # A flag alone means true where that is a value; elsewhere its value is None and told to be missing.
        alone = {} if key.takes_several else {"const": "true" if key.field.annotation is bool else None}
        groups[section].add_argument(
            f"--{key.dotted}",
            dest=key.dotted,
            nargs="*" if key.takes_several else "?",
            **alone,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{key.field.description} ({key.type_name}; {key.default})".replace("%", "%%"),
        )
    return parser


def _nearest(name: str, valid: Sequence[str]) -> str:
    """`; did you mean X?` for the valid key that looks most like `name`, comparing also its last part alone."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not close:
        last_parts = {key.rpartition(".")[2]: key for key in valid}
        close = [last_parts[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1)]
    return f"; did you mean {close[0]}?" if close else ""


def _option_value(key: Key, given: Any) -> Any:
    """The value of one command-line option, read as YAML reads it unless the key takes text."""

    def scalar(text: str) -> Any:
        if text in ("null", "None") and type(None) in _alternatives(key.field.annotation):
            return None
        return text if key.is_text or key.takes_several else load_with_lines(text, key.dotted).value

    if not key.takes_several:
        return scalar(given)
    if len(given) == 1 and given[0] in [
        value
        for option in _alternatives(key.field.annotation)
        for value in typing.get_args(option)
        if typing.get_origin(option) is typing.Literal
    ]:
        return given[0]
    return [] if given == ["[]"] else list(given)


def _place(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def resolve(
    config: str | None, overrides: dict[str, Any], unknown: Sequence[str] = ()
) -> tuple[Settings, dict[str, str]]:
    """Validated settings from a YAML file and command-line options, and where each value that is no default is from.

    Raises:
        UsageError: with every problem found, each with its file and line or its option.
    """
    keys = all_keys()
    problems: list[str] = []
    for before, given in zip([None, *unknown], unknown, strict=False):
        flag = given.split("=")[0]
        if flag.startswith("-"):
            problems.append(f"{flag}: unknown option{_nearest(flag.lstrip('-'), list(keys))}")
        elif before is None or not before.startswith("-"):  # else it is the value of the unknown option
            problems.append(f"{given!r}: an argument that belongs to no option")
    tree: dict[str, Any] = {}
    lines: dict[str, int] = {}
    readable = False
    if config is None:
        problems.append("--config: needs a YAML file, such as configs/quickstart.yaml")
    else:
        try:
            loaded = load_with_lines(_read(config), config, text_keys={k for k, key in keys.items() if key.is_text})
            problems += loaded.problems
            tree, lines, readable = loaded.value or {}, loaded.lines, True
        except UsageError as error:
            problems += error.problems
    if not isinstance(tree, dict):
        problems.append(f"{config}:1: expected a mapping of sections, found {type(tree).__name__}")
        tree = {}
    origin = {dotted: f"{config}:{line}" for dotted, line in lines.items()}
    for dotted, given in overrides.items():
        if given is None:
            problems.append(f"--{dotted}: needs a value ({keys[dotted].type_name})")
        else:
            _place(tree, dotted, _option_value(keys[dotted], given))
            origin[dotted] = f"--{dotted}"

    def complain(dotted: str, message: str) -> None:
        place = next((origin[name] for name in _ancestors(dotted) if name in origin), config or "settings")
        line = f"{place}: {message}" if place == f"--{dotted}" else f"{place}: {dotted}: {message}"
        if line not in problems:
            problems.append(line)

    settings = None
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        for problem in error.errors():
            # Of a file that could not be read, what it would have held is not worth a complaint.
            if readable or problem["type"] != "missing":
                _explain(problem, keys, complain)
    if settings is not None:
        for dotted, message in conflicts(settings):
            complain(dotted, message)
    if problems or settings is None:
        raise UsageError(problems)
    return settings, origin


def _ancestors(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _explain(problem: Any, keys: dict[str, Key], complain: Callable[[str, str], None]) -> None:
    """One pydantic error in the words of the settings."""
    parts = [str(part) for part in problem["loc"]]
    dotted = next((name for name in _ancestors(".".join(parts)) if name in keys), ".".join(parts))
    if problem["type"] == "extra_forbidden":
        sections = list(Settings.model_fields)
        complain(dotted, "unknown key" + _nearest(dotted, [*keys, *sections]))
    elif problem["type"] == "missing":
        complain(dotted, "is required and missing")
    elif dotted in keys:
        reason = problem["msg"][0].lower() + problem["msg"][1:]
        expected = keys[dotted].type_name
        wrong_kind = problem["type"].endswith(("_type", "_parsing", "literal_error"))
        complain(
            dotted,
            f"expected {expected}, found {problem['input']!r}"
            if wrong_kind
            else f"{reason}, found {problem['input']!r}",
        )
    else:
        complain(dotted, f"expected a section with keys, found {problem['input']!r}")


def _read(config: str) -> str:
    path = Path(config)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError([f"{config}: not UTF-8 text (byte {error.start})"]) from None
    except OSError as error:
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UsageError(
            [f"{config}: {(error.strerror or 'unreadable').lower()}{_nearest(config, siblings)}"]
        ) from None


def describe(settings: Settings, origin: dict[str, str]) -> str:
    """The resolved settings as YAML, each value that is no default marked with where it comes from."""
    lines = []
    tree = settings.model_dump()
    for name, value in tree.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            entries = [(f"  {key}", f"{name}.{key}", leaf) for key, leaf in value.items()]
        else:
            entries = [(name, name, value)]
        for label, dotted, leaf in entries:
            source = next((origin[d] for d in (dotted,) if d in origin), None)
            mark = (
                ""
                if source is None
                else "  # overridden on the command line"
                if source.startswith("--")
                else f"  # {source}"
            )
            lines.append(f"{label}: {_as_yaml(leaf)}{mark}")
    return "\n".join(lines) + "\n"


def run_script(
    name: str,
    doc: str,
    steps: Callable[[Settings, argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    options: Sequence[tuple[str, dict[str, Any]]] = (),
) -> int:
    """Runs one script: settings, lock, steps. Returns the exit status of DESIGN's contract.

    Args:
        name: file name of the script, for messages.
        doc: its docstring, shown by --help.
        steps: what it does, given the settings and the script's own options.
        argv: arguments without the program's name; None takes those of the process.
        options: the script's own flags, each with the keywords of `ArgumentParser.add_argument`.
    """
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        parser = _parser(name, doc, options)
        try:
            arguments, unknown = parser.parse_known_args(argv)
        except argparse.ArgumentError as error:
            raise UsageError([str(error)]) from None
        keys = all_keys()
        overrides = {dotted: given for dotted, given in vars(arguments).items() if dotted in keys}
        settings, origin = resolve(arguments.config, overrides, unknown)
        if arguments.print_config:
            print(describe(settings, origin), end="")
            return 0
        from kestrel.artifacts import run_folder

        _quieten_libraries()
        previous = signal.signal(signal.SIGTERM, _terminate)
        try:
            with run_folder(settings.run_dir, describe(settings, {})):
                steps(settings, arguments)
        finally:
            signal.signal(signal.SIGTERM, previous)
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the last line of defence
        if debug and not isinstance(error, UsageError):
            traceback.print_exc()
        status, message = _verdict(error)
        print(f"{name}: {message}", file=sys.stderr)
        return status


def _quieten_libraries() -> None:
    """Progress bars only on a terminal; no deprecation notes that the user of a script can do nothing about."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")


def _terminate(signal_number: int, frame: Any) -> None:
    raise Interrupted(signal_number)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit status and message for what ended a script."""
    if isinstance(error, UsageError):
        several = (
            f"{len(error.problems)} problems in the settings"
            if len(error.problems) > 1
            else "a problem in the settings"
        )
        return 2, several + "\n  " + "\n  ".join(error.problems)
    if isinstance(error, KestrelError):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command again to go on"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"the disk is full ({error.filename or os.getcwd()}); free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return 1, f"no permission: {error.filename or error}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return 1, (
            "out of memory; in order of effect: lower training.tokens_per_step or generation.tokens_per_step, set "
            "training.gradient_checkpointing: true, keep quantization.bits: 4, lower prompt.max_length"
        )
    return 1, f"unexpected {type(error).__name__}: {error}\n  run it again with --debug to see where"
