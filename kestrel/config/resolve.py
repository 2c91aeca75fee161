"""From a YAML file and options to validated settings, and back to YAML.

pydantic checks the values; this module adds the line of each value, the nearest valid key, and options of the form
`--section.key VALUE`.
"""

from __future__ import annotations

import copy
import difflib
import operator
import os
import select
import stat
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from kestrel.config.conflicts import conflicts
from kestrel.config.keys import Key, all_keys, as_yaml
from kestrel.config.settings import Settings
from kestrel.config.yaml_file import Loaded, load_with_lines
from kestrel.errors import UsageError

_LONGEST = 2**18  # bytes of a YAML file
_PATHS = (
    "run_dir",
    "data.source",
    "data.dataset",
    "prompt.chat_template",
    "model.name",
    "model.adapter",
    "training.init_adapter",
    "training.resume",
    "evaluation.output",
    "evaluation.nli",
)  # or ids and words
_LISTS_OF_PATHS = ("data.persona", "evaluation.generations", "evaluation.compare", "evaluation.judgements")

# Options of the launchers, which users may put after the script's name.
_LAUNCHERS = {
    "torchrun": "nproc_per_node nnodes node_rank master_addr master_port rdzv_backend rdzv_endpoint rdzv_id rdzv_conf "
    "standalone max_restarts shutdown_timeout",
    "accelerate launch": "config_file num_processes num_machines machine_rank main_process_ip main_process_port "
    "multi_gpu use_fsdp cpu gpu_ids mixed_precision",
}


# What other tools call a key.
_OTHER_NAMES = {
    "data.source": "dataset dataset_name dataset_path train_file data_path data_files",
    "generation.max_new_tokens": "max_tokens",
    "generation.num_beams": "beams beam_size",
    "hub.repo_id": "push_to_hub hub_model_id repo",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.r": "rank lora_r lora_rank",
    "lora.target_modules": "lora_target_modules lora_target targets modules",
    "model.adapter": "adapter_name_or_path lora_path lora_model_dir peft_model adapter_path",
    "model.name": "model_name_or_path base_model model_id model_path pretrained_model_name_or_path checkpoint",
    "prompt.format": "template chat_template_format",
    "prompt.max_length": "max_seq_length sequence_len cutoff_len max_seq_len model_max_length block_size",
    "quantization.bits": "load_in_4bit load_in_8bit quantization_bit",
    "quantization.compute_dtype": "bf16 fp16 dtype torch_dtype bnb_4bit_compute_dtype precision",
    "quantization.type": "bnb_4bit_quant_type",
    "run_dir": "output_dir output out_dir save_dir run_name",
    "training.batch_size": "batch per_device_train_batch_size train_batch_size gradient_accumulation_steps",
    "training.epochs": "num_epochs num_train_epochs",
    "training.evaluations": "eval_steps eval_strategy save_steps",
    "training.keep_checkpoints": "save_total_limit",
    "training.learning_rate": "lr",
    "training.lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
    "training.max_grad_norm": "clip grad_clip gradient_clipping",
    "training.optimizer": "optim",
    "training.recompute": "gradient_checkpointing activation_checkpointing",
    "training.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "training.tokens_per_step": "micro_batch_size",
    "training.warmup_ratio": "warmup warmup_steps",
}


def _nearest(name: str, valid: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?` for the key that other tools call so, or looks most like `name` or like its last part alone."""
    word = name.rpartition(".")[2].replace("-", "_").lower()
    meant = [key for key, names in _OTHER_NAMES.items() if word in names.split() and key in valid]
    close = meant or difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if not close:
        last_parts = {key.rpartition(".")[2]: key for key in valid}
        close = [last_parts[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1)]
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _option_value(key: Key, given: Any) -> Any:
    """The value of one command-line option, read as YAML reads it unless the key takes text."""
    if key.takes_several:
        words = [typing.get_args(option) for option in key.alternatives if typing.get_origin(option) is Literal]
        if len(given) == 1 and any(given[0] in each for each in words):
            return given[0]
        return [] if given == ["[]"] else list(given)
    if given in ("null", "None") and type(None) in key.alternatives:
        return None
    try:
        return given if key.is_text else load_with_lines(given, key.dotted).value
    except UsageError:
        return given  # and the settings say what they expect instead


def _place(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def resolve(
    config: str | None,
    overrides: dict[str, Any],
    unknown: Sequence[str] = (),
    flags: Sequence[str] = (),
    unused: Mapping[str, str] = MappingProxyType({}),
    preset: dict[str, Any] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Validated settings from a YAML file and command-line options, and the origin of each value that is no default.

    Args:
        config: the YAML file.
        overrides: dotted key -> value as given; None where the value is missing, a list where several may be given.
        unknown: arguments that are no known option.
        flags: names of the options that are not keys.
        unused: keys that the script would ignore, and why that is refused.
        preset: what stands for the file where there is none.

    Raises:
        UsageError: with every problem found, each with its file and line or its option.
    """
    keys = all_keys()
    loaded = Loaded(copy.deepcopy(preset)) if config is None and preset else _load(config, keys)
    problems = _unknown_arguments(unknown, [*keys, *flags]) + loaded.problems
    tree = loaded.value or {}
    origin = {dotted: f"{config}:{line}" for dotted, line in loaded.lines.items()}
    for dotted, given in overrides.items():
        if given is None:
            problems.append(f"--{dotted}: needs a value ({keys[dotted].type_name})")
        else:
            _place(tree, dotted, _option_value(keys[dotted], given))
            origin[dotted] = f"--{dotted}"

    reported: set[str] = set()

    def report(dotted: str, message: str) -> None:
        place = next((origin[name] for name in _ancestors(dotted) if name in origin), config or "settings")
        # pydantic reports each type that a value could have had; one message is enough.
        if dotted not in reported or not message.startswith("expected"):
            problems.append(f"{place}: {message}" if place == f"--{dotted}" else f"{place}: {dotted}: {message}")
        reported.add(dotted)

    settings = None
    try:
        settings = Settings.model_validate(tree)
        ignored = [(key, why) for key, why in unused.items() if operator.attrgetter(key)(settings) is not None]
        for dotted, message in [*conflicts(settings, overrides), *ignored, *_unusable_paths(settings)]:
            report(dotted, message)
    except ValidationError as error:
        for problem in error.errors():
            # A key that is missing from an unreadable file may be in it.
            if loaded.value is not None or problem["type"] != "missing":
                _explain(problem, keys, report)
    if problems or settings is None:
        raise UsageError(problems)
    return settings, origin


def _option_for(given: str) -> str:
    """A hint at the option that a file without one is meant for."""
    if given.endswith((".yaml", ".yml")):
        return f"; did you mean --config {given}?"
    if Path(given).exists():
        return "; dialogues are given by --data.source, answers to be scored by --evaluation.generations"
    return ""


def _unknown_arguments(unknown: Sequence[str], known: list[str]) -> list[str]:
    """A message for each unknown option, and for each argument that is not the value of one."""
    problems = []
    for before, given in zip(["", *unknown], unknown, strict=False):
        flag = given.split("=")[0]
        name = flag.lstrip("-")
        launchers = [each for each, names in _LAUNCHERS.items() if name.replace("-", "_") in names.split()]
        if not flag.startswith("-"):
            if not before.startswith("-"):
                problems.append(f"{given!r}: an argument that belongs to no option{_option_for(given)}")
        elif launchers:
            problems.append(f"{flag}: an option of {launchers[0]}; it goes before the script's name")
        else:
            problems.append(f"{flag}: unknown option{_nearest(name, known, '--')}")
    return problems


def _load(config: str | None, keys: dict[str, Key]) -> Loaded:
    """The file's content with the line of each dotted key, and its problems; its value is None if it cannot be read."""
    if config is None:
        return Loaded(None, problems=["--config: needs a YAML file, such as configs/quickstart.yaml"])
    try:
        loaded = load_with_lines(_read(config), config, text_keys={name for name, key in keys.items() if key.is_text})
    except UsageError as error:
        return Loaded(None, problems=error.problems)
    tree = loaded.value or {}
    if not isinstance(tree, dict):
        loaded.problems.append(f"{config}:1: expected a mapping of sections, found {type(tree).__name__}")
        return Loaded(None, loaded.lines, loaded.problems)
    # A section whose keys are all commented out is None.
    loaded.value = {name: {} if value is None and name not in keys else value for name, value in tree.items()}
    return loaded


def _ancestors(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _explain(problem: Any, keys: dict[str, Key], report: Callable[[str, str], None]) -> None:
    """One pydantic error in the words of the settings."""
    parts = [str(part) for part in problem["loc"]]
    dotted = next((name for name in _ancestors(".".join(parts)) if name in keys), ".".join(parts))
    try:
        value = repr(problem["input"])
    except ValueError:  # Python writes no number of more than 4,300 digits
        value = "a number of thousands of digits"
    found = f"found {value}" if len(value) <= 200 else f"found {value[:60]}… ({len(value):,} characters)"
    if problem["type"] == "extra_forbidden":
        if parts[0] in keys:  # `training.epochs: 1` for a section with a key
            section, _, name = parts[0].rpartition(".")
            report(parts[0], f"write it as a section: `{section}:`, and below it, indented, `{name}:`")
        else:
            report(dotted, "unknown key" + _nearest(dotted, [*keys, *Settings.model_fields]))
    elif problem["type"] == "missing":
        required = [name for name, key in keys.items() if name.startswith(f"{dotted}.") and key.field.is_required()]
        for name in required or [dotted]:
            report(name, "is required and missing")
    elif dotted not in keys:
        report(dotted, f"expected a section with keys, {found}")
    elif problem["type"].endswith(("_type", "_parsing", "literal_error")):
        report(dotted, f"expected {keys[dotted].type_name}, {found}")
    else:
        report(dotted, f"{problem['msg'][0].lower()}{problem['msg'][1:]}, {found}")


def _unusable_paths(settings: Settings) -> Iterator[tuple[str, str]]:
    """Paths that exist but are no file or folder, or that the file system cannot have: (dotted key, what is wrong)."""
    given: list[tuple[str, str | None]] = [(key, operator.attrgetter(key)(settings)) for key in _PATHS]
    given += [(key, path) for key in _LISTS_OF_PATHS for path in operator.attrgetter(key)(settings)]
    for key, path in given:
        if path is None:
            continue
        if key != "data.persona" and any(len(os.fsencode(part)) > 255 for part in path.split("/")):
            yield key, f"{path[:60]}… names a file or folder of more than 255 bytes"
            continue
        try:
            mode = os.stat(os.path.expanduser(path)).st_mode
        except NotADirectoryError:
            if key == "run_dir":
                yield key, f"{path} is below a file; expected a folder"
            continue
        except OSError:
            continue
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            yield key, f"{path} is a pipe, a socket or a device; expected a file or a folder"
        elif stat.S_ISREG(mode) and key in ("run_dir", "model.name"):
            yield key, f"{path} is a file; expected a folder"


def _read(config: str) -> str:
    path = Path(config)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not select.select([file], [], [], 1)[0]:
                raise UsageError([f"{config}: a pipe to which nobody writes"])
            os.set_blocking(descriptor, True)
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise UsageError([f"{config}: more than {_LONGEST:,} bytes; not an experiment"])
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError([f"{config}: not UTF-8 text (byte {error.start})"]) from None
    except ValueError as error:  # a zero byte in the name
        raise UsageError([f"{config!r}: {error}"]) from None
    except OSError as error:
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
        reason = (error.strerror or "unreadable").lower()
        raise UsageError([f"{config}: {reason}{_nearest(config, siblings)}"]) from None


def describe(settings: Settings, origin: dict[str, str]) -> str:
    """The resolved settings as YAML, with the origin of each value that is not a default."""
    lines = []
    for section, value in settings.model_dump().items():
        if isinstance(value, dict):
            lines.append(f"{section}:")
        for name, leaf in value.items() if isinstance(value, dict) else [("", value)]:
            label, dotted = (f"  {name}", f"{section}.{name}") if name else (section, section)
            source = origin.get(dotted, "")
            mark = "  # overridden on the command line" if source.startswith("--") else source and f"  # {source}"
            lines.append(f"{label}: {as_yaml(leaf)}{mark}")
    return "\n".join(lines) + "\n"
