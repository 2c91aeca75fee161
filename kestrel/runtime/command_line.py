"""What all scripts share: options, --help, the folder's lock, and an exit status and one message for every failure.

Nothing heavy is imported before the settings are known to be valid, and no package before Ctrl-C ends a script quietly.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shlex
import shutil
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kestrel.errors import Interrupted, KestrelError, UsageError
from kestrel.runtime import distributed
from kestrel.runtime.output import prepare_output
from kestrel.runtime.run_folder import link_dataset, locked_run_folder
from kestrel.runtime.signals import INTERRUPTED, exit_now, ignore_signal, on_signals

if TYPE_CHECKING:
    from kestrel.config.settings import Settings

Options = Sequence[tuple[str, dict[str, Any]]]  # flags, each with the keywords of `ArgumentParser.add_argument`

# The sections of the settings that each script uses, for --help, and the script that is run after it.
_MODEL = ("data", "prompt", "model", "quantization")
_SECTIONS = {
    "preprocess.py": ("data", "prompt", "model"),
    "train.py": (*_MODEL, "lora", "training"),
    "generate.py": (*_MODEL, "generation"),
    "evaluate.py": ("data", "evaluation"),
    "publish.py": (*_MODEL, "lora", "hub"),
    "chat.py": (*_MODEL, "generation"),
}
_NEXT = {
    "preprocess.py": "train.py", "train.py": "generate.py", "generate.py": "evaluate.py", "evaluate.py": "chat.py",
}  # fmt: skip
# Sections and keys that only some scripts use; the first is named in messages. hub.base_model says what an adapter fits.
_USERS = {
    "evaluation": ("evaluate.py", "publish.py"),
    "hub": ("publish.py",),
    "hub.language": ("publish.py", "evaluate.py"),
    "hub.base_model": tuple(_SECTIONS),
    "model.adapter": ("generate.py", "train.py", "evaluate.py", "publish.py", "chat.py"),
    **{
        f"generation.{key}": ("generate.py", "preprocess.py", "train.py", "evaluate.py", "publish.py")
        for key in ("max_dialogues", "references", "candidates", "other_personas", "persona_orders")
    },
}

_OUT_OF_MEMORY = (
    "out of memory; in order of effect: lower training.tokens_per_step or generation.tokens_per_step, set "
    "training.recompute: full, keep quantization.bits: 4, lower prompt.max_length"
)
_LOST_CONNECTION = (
    "another process of this run ended without a message, perhaps killed because memory ran out; the launcher names it "
    "below. Run the same command again to continue"
)


def run_script(
    name: str,
    doc: str,
    steps: Callable[[Settings, argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    options: Options = (),
    writes: bool = True,
    together: bool = False,
    unused: Mapping[str, str] = MappingProxyType({}),
    presets: Mapping[str, dict[str, Any]] | None = None,
) -> int:
    """Runs a script: settings, lock, steps.

    Args:
        name: the script's file name, for messages.
        doc: its docstring, for --help.
        steps: what it does with the settings and its own options; `again` has those with which another script goes on.
        argv: arguments without the program's name; None for those of the process.
        options: the script's own flags.
        writes: whether it writes to the run folder, which it then locks, unless its flag --dry-run is given.
        together: whether several processes share the work. In other scripts only the first process does anything.
        unused: keys that it would ignore though a user may expect otherwise, and what to do instead. They are refused.
        presets: by dotted key, what stands for the YAML file where there is none and that key is given. Such a call
            belongs to no run, and locks no folder.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
    """
    if (status := _status_without_work(name, together)) is not None:
        return status
    prepare_output()
    stderr, run_dir = sys.stderr, None
    with on_signals(ignore_signal):  # while a failure is reported: the launcher ends the other processes with SIGTERM
        try:
            with on_signals(exit_now):
                arguments, settings, origin = _read_command_line(name, doc, argv, options, unused, presets or {})
                from kestrel.config.resolve import describe

                run_dir = settings.run_dir
                if arguments.print_config:
                    if distributed.is_first():
                        print(describe(settings, origin), end="", flush=True)
                    return 0
                _set_up_libraries()
                locks = writes and arguments.config is not None and not getattr(arguments, "dry_run", False)
                folder = locked_run_folder(run_dir, describe(settings, {})) if locks else contextlib.nullcontext()
                with distributed.only_first_prints(), folder:
                    _name_unused(name, vars(arguments))
                    if together and (warning := distributed.launch_warning()):
                        print(f"warning: {warning}", file=sys.stderr)
                    if locks and settings.data.dataset is not None and distributed.is_first():
                        link_dataset(Path(run_dir), settings.dataset_dir)
                    steps(settings, arguments)
                    if following := _following(name, settings, arguments):
                        print(f"\nnext: python {following} {arguments.again}")
                distributed.leave_process_group()
                return 0
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  any failure becomes one message
            debug = "--debug" in (sys.argv if argv is None else argv)
            return _failed(name, error, run_dir, debug, stderr)


def _status_without_work(name: str, together: bool) -> int | None:
    """The exit status of a process that has nothing to do, or cannot tell which of several it is; None for all others."""
    if problem := distributed.launch_problem():
        print(f"{name}: {problem}", file=sys.stderr)
        return 1
    if together or distributed.is_first():
        return None
    if distributed.started_by_hand():
        where = f"RANK={distributed.rank()} of WORLD_SIZE={distributed.world_size()}"
        print(f"note: {name} works in the first process alone, and this is {where}", file=sys.stderr)
    return 0


def _following(name: str, settings: Settings, arguments: argparse.Namespace) -> str | None:
    """The script that comes next; None where nothing does."""
    if settings.evaluation.generations:
        return None
    following = name if getattr(arguments, "dry_run", False) else _NEXT.get(name)
    return "generate.py" if following == "train.py" and settings.model.adapter is not None else following


def _name_unused(name: str, given: Collection[str]) -> None:
    """Says which options are for another script: they are neither used nor in the command that is printed at the end."""
    for dotted in given:
        users = _USERS.get(dotted) or _USERS.get(dotted.partition(".")[0], (name,))
        if name not in users:
            print(f"note: --{dotted} is for {users[0]}; {name} does not use it", file=sys.stderr)


def _failed(name: str, error: BaseException, run_dir: str | None, debug: bool, stderr: Any) -> int:
    """Says why a script failed; with debug by a traceback too. Returns the exit status."""
    status, message = _verdict(error, run_dir)
    if text := distributed.failure_to_report(message):
        if debug and not isinstance(error, UsageError):
            traceback.print_exception(error, file=stderr)
        print(f"{name}: {text}", file=stderr, flush=True)
    return status


def _read_command_line(
    name: str,
    doc: str,
    argv: Sequence[str] | None,
    options: Options,
    unused: Mapping[str, str],
    presets: Mapping[str, dict[str, Any]],
) -> tuple[argparse.Namespace, Settings, dict[str, str]]:
    """The script's own options, the settings, and where each of them comes from."""
    from kestrel.config.keys import all_keys
    from kestrel.config.resolve import resolve

    try:
        with distributed.only_first_prints():  # --help
            everything = "--help-all" in (sys.argv if argv is None else argv)
            parser = _parser(name, doc, options, () if everything else _SECTIONS.get(name, ()), unused)
            arguments, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError([str(error)]) from None
    keys = all_keys()
    overrides = {dotted: given for dotted, given in vars(arguments).items() if dotted in keys}
    flags = ["config", "print-config", "debug", "help", "help-all", *(flag.lstrip("-") for flag, _ in options)]
    preset = next((tree for dotted, tree in presets.items() if dotted in overrides), None)
    settings, origin = resolve(arguments.config, overrides, unknown, flags, unused, preset)
    words = ["--config", str(arguments.config)]
    for dotted, given in overrides.items():
        if dotted.startswith(("evaluation.", "hub.")):
            continue  # of the script that is running
        words += [f"--{dotted}", *(given if isinstance(given, list) else [given])]
    arguments.again = shlex.join(words)
    return arguments, settings, origin


def _parser(
    name: str, doc: str, options: Options, sections: Sequence[str], unused: Collection[str]
) -> argparse.ArgumentParser:
    """Takes every key; --help shows those of the given sections but the unused ones, or all where no section is given."""
    from kestrel.config.keys import all_keys
    from kestrel.config.settings import Settings

    width = min(118, shutil.get_terminal_size((118, 24)).columns)
    parser = argparse.ArgumentParser(
        prog=name,
        description=textwrap.dedent(doc),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width),
        usage=f"python {name} --config configs/NAME.yaml [--section.key VALUE ...] [--print-config] [--help]",
        allow_abbrev=False,
        exit_on_error=False,
        epilog="Each script takes the keys of all sections; --help-all shows them too." if sections else None,
    )
    parser.add_argument("--help-all", action="help", help="show this help with the keys of every section and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    for flag, arguments in options:
        parser.add_argument(flag, **arguments)
    groups: dict[str, Any] = {}
    for key in all_keys().values():
        section = key.dotted.rpartition(".")[0]
        is_shown = not (section and sections) or (section in sections and key.dotted not in unused)
        if section not in groups:
            description = Settings.model_fields[section].annotation.__doc__ if section else None
            title = (section or "experiment", description) if is_shown else ()
            groups[section] = parser.add_argument_group(*title)
        # A flag alone means true for a Boolean; for others its value is None, which `resolve` reports as missing.
        alone = {} if key.takes_several else {"const": "true" if key.field.annotation is bool else None}
        groups[section].add_argument(
            f"--{key.dotted}",
            dest=key.dotted,
            nargs="*" if key.takes_several else "?",
            **alone,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{key.field.description} ({key.type_name}; {key.default})".replace("%", "%%")
            if is_shown
            else argparse.SUPPRESS,
        )
    return parser


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Says that a thread of a library failed, such as TensorBoard's on a full disk; the script goes on or fails itself."""
    thread = failure.thread.name if failure.thread else "a thread"
    print(f"note: {thread} failed: {failure.exc_type.__name__}: {failure.exc_value}", file=sys.stderr)


def _set_up_libraries() -> None:
    """Progress bars only on a terminal, no warnings that the user of a script can do nothing about, and less memory."""
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # oneDNN, which multiplies matrices on a CPU, keeps a compiled kernel for each shape: by default 1,024 of them, which
    # in 250 steps grow to 0.4 GiB. 64 serve the layers of a step, and nothing was slower (SmolLM2-135M, two cores).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    threading.excepthook = _report_thread
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")
    # bitsandbytes (0.50) warns on CPUs with AVX512-BF16 that a package for repacking weights is missing, which
    # `quantization.forbid_repacking` forbids.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _verdict(error: BaseException, run_dir: str | None) -> tuple[int, str]:
    """Exit status and message for what ended a script."""
    if isinstance(error, UsageError):
        count = len(error.problems)
        head = f"{count} problems in the settings" if count > 1 else "a problem in the settings"
        return 2, "\n  ".join([head, *error.problems])
    if isinstance(error, KestrelError | Interrupted):
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, INTERRUPTED
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("kestrel"):
        return 1, (
            f"the package {error.name.partition('.')[0]} is not installed for {sys.executable}; use .venv/bin/python, "
            f"which make sets up, or run: {sys.executable} -m pip install -r requirements.txt"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or run_dir or "standard output"
        return 1, f"the disk is full ({where}); free some space and run the same command again"
    if isinstance(error, OSError) and error.errno == errno.EIO:
        return (
            1,
            f"the disk cannot be read or written ({error.filename or run_dir}); check it and run the same command again",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return 1, f"no permission to write: {error.filename or error}; change that, or give this run another run_dir"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return 1, _OUT_OF_MEMORY
    if distributed.is_lost_connection(error):
        return 1, _LOST_CONNECTION
    return 1, f"unexpected {type(error).__name__}: {error}\n  run it again with --debug to see where"
