"""What all scripts share: options, --help, the lock, and from whatever happens to an exit status and one message.

Nothing heavy is imported before the settings are known to be valid.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from kestrel import not_installed
from kestrel.config.keys import all_keys
from kestrel.config.resolve import describe, resolve
from kestrel.config.settings import Settings
from kestrel.errors import Interrupted, KestrelError, UsageError
from kestrel.runtime import distributed, rendezvous
from kestrel.runtime.signals import on_signals, prepare_output


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


def run_script(
    name: str,
    doc: str,
    steps: Callable[[Settings, argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    options: Sequence[tuple[str, dict[str, Any]]] = (),
    writes: bool = True,
    together: bool = False,
) -> int:
    """Runs one script: settings, lock, steps. Returns the exit status of DESIGN's contract.

    Args:
        name: file name of the script, for messages.
        doc: its docstring, shown by --help.
        steps: what it does, given the settings and the script's own options.
        argv: arguments without the program's name; None takes those of the process.
        options: the script's own flags, each with the keywords of `ArgumentParser.add_argument`.
        writes: whether it makes something in the run folder, which is then locked and told the settings, unless it has
            a flag --dry-run and that is given.
        together: whether several processes share the work. Of other scripts' processes the first does it, and the rest
            leave at once.
    """
    if not (together or distributed.is_first()):
        return 0
    debug = "--debug" in (sys.argv if argv is None else argv)
    run_dir = None
    prepare_output()
    errors = sys.stderr
    try:
        parser = _parser(name, doc, options)
        try:
            with distributed.only_first_speaks():  # --help
                arguments, unknown = parser.parse_known_args(argv)
        except argparse.ArgumentError as error:
            raise UsageError([str(error)]) from None
        keys = all_keys()
        overrides = {dotted: given for dotted, given in vars(arguments).items() if dotted in keys}
        flags = ["config", "print-config", "debug", "help", *(flag.lstrip("-") for flag, _ in options)]
        settings, origin = resolve(arguments.config, overrides, unknown, flags)
        if arguments.print_config:
            if distributed.is_first():
                print(describe(settings, origin), end="", flush=True)
            return 0
        from kestrel.runtime.run_folder import locked_run_folder

        run_dir = settings.run_dir
        arguments.again = _typed_again(arguments.config, overrides)
        _quieten_libraries()
        dry = getattr(arguments, "dry_run", False)
        folder = (
            locked_run_folder(settings.run_dir, describe(settings, {}))
            if writes and not dry
            else contextlib.nullcontext()
        )
        with on_signals(), distributed.only_first_speaks(), folder:
            if together and (warning := rendezvous.why_alone()):
                print(f"warning: {warning}", file=sys.stderr)
            steps(settings, arguments)
        distributed.leave()
        return 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the last line of defence
        status, message = _verdict(error, run_dir)
        if told := distributed.failure_to_tell(message):
            if debug and not isinstance(error, UsageError):
                traceback.print_exc(file=errors)
            print(f"{name}: {_printable(told)}", file=errors, flush=True)
        return status


def _printable(text: str) -> str:
    """What a file or an option put into a message must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _quieten_libraries() -> None:
    """Progress bars only on a terminal; no deprecation notes that the user of a script can do nothing about."""
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")


def _typed_again(config: str, overrides: dict[str, Any]) -> str:
    """The options of this call, as another script must be given them to speak of the same run."""
    words = ["--config", config]
    for dotted, given in overrides.items():
        words += [f"--{dotted}", *(given if isinstance(given, list) else [given])]
    return shlex.join(words)


def _verdict(error: BaseException, run_dir: str | None) -> tuple[int, str]:
    """Exit status and message for what ended a script."""
    if isinstance(error, UsageError):
        several = (
            f"{len(error.problems)} problems in the settings"
            if len(error.problems) > 1
            else "a problem in the settings"
        )
        return 2, several + "\n  " + "\n  ".join(error.problems)
    if isinstance(error, KestrelError | Interrupted):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; run the same command again to go on"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("kestrel"):
        return 1, not_installed(error.name.partition(".")[0])
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or run_dir or "standard output"
        return 1, f"the disk is full ({where}); free some space and run the same command again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return 1, f"no permission to write: {error.filename or error}; mend it, or give this run another run_dir"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return 1, (
            "out of memory; in order of effect: lower training.tokens_per_step or generation.tokens_per_step, set "
            "training.recompute: full, keep quantization.bits: 4, lower prompt.max_length"
        )
    if distributed.is_abandoned(error):
        return 1, (
            "another process of this run ended without a word: killed, by the machine's lack of memory perhaps; the "
            "launcher says below which. The same command goes on"
        )
    return 1, f"unexpected {type(error).__name__}: {error}\n  run it again with --debug to see where"
