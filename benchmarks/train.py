"""Trains a model on the same dialogues with Kestrel and with its peers, and says who is how fast in how much memory.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train.py --profile cpu --output benchmarks/results/train-cpu.json [--text FILE]
    python benchmarks/train.py --profile gpu --output benchmarks/results/train-gpu.json [--text FILE]
    python benchmarks/train.py --profile gpu --shape qwen2.5-7b --unsloth FOLDER --output FILE [--text FILE]

cpu: a Falcon of 18 million parameters; gpu: Falcon-7B's exact shape; with --shape, a model of shapes.py instead, and LoRA
on all of its linear layers. The weights are random and written for the run. All systems have the same NF4 layers, the
same LoRA, the same optimizer and the same tokens. One whose losses or LoRA's gradient are not those of transformers' own
model gets no time. Each runs in a process of its own. The JSON is written after every row.

    kestrel         train.py, its steps timed as they are; -10gb, -8gb: within so much memory
    trl-turns       TRL's SFTTrainer, one example a turn
    trl-dialogues   TRL's SFTTrainer, whole dialogues, loss on the replies; grouped: by length; packed: with packing
    trl, trl-liger  the same on a GPU with --shape; with Liger's kernels; checkpointing: with gradient checkpointing
    unsloth         its model in its SFTTrainer, whole dialogues; checkpointing: with its own gradient checkpointing
    original        transformers' Trainer, each turn padded to 512 tokens, loss on everything, k-bit preparation

Useful tokens are those of the dialogues, each counted once, whatever a system computes again. Utilisation is 4 FLOPs a
linear parameter and useful token (2 forward, 2 backward) over the rate of a matrix product in the same run. Where fewer
steps are timed than an epoch has, its seconds are extrapolated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.options import at_least_one, command_of, parser_of, told

if TYPE_CHECKING:
    from benchmarks.profiles import System

_PREPARE = "prepare"


def one_process(options: argparse.Namespace) -> int:
    """The work of a process that measures one row; its result, or what went wrong, is a JSON file beside it."""
    from benchmarks.shape_profiles import profile_of

    profile = profile_of(options.profile, options.shape)
    system = next((system for system in profile.systems if system.name == options.row), None)
    if system is not None and system.kind == "unsloth":
        import unsloth  # noqa: F401  before all that it replaces parts of

    import torch

    from benchmarks import systems
    from kestrel.errors import KestrelError, ProofError
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import library_versions

    work, model = options.work, options.model
    try:
        if system is None:
            result = systems.prepare(work, model, profile, options.text, options.layers)
        else:
            system = replace(system, **json.loads(options.instead))
            result = systems.measure(system, work, model, profile, options.dtype, options.began)
            if system.kind == "unsloth":
                result["versions"] = library_versions() | versions_of("unsloth", "unsloth_zoo", "trl")
    except ProofError as error:
        result = {"disagrees": str(error)}
    except KestrelError as error:
        result = {"failed": str(error)}
    except torch.OutOfMemoryError:
        result = {"out_of_memory": True}
    write_json(work / f"{options.row}.json", result)
    return 0


def versions_of(*names: str) -> dict[str, str]:
    """Of those of the packages that are installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def start(row: str, options: argparse.Namespace, work: Path, **more: Any) -> dict[str, Any]:
    """Runs one process and reads its result, or the end of what it said where it left none."""
    from kestrel.runtime.atomic import read_json

    given = {"row": row, "profile": options.profile, "shape": options.shape, "text": options.text, "work": work}
    given |= {"layers": options.layers, "model": options.model or work / "model", "began": time.time(), **more}
    command = [item for key, value in given.items() if value is not None for item in (f"--{key}", str(value))]
    (work / f"{row}.json").unlink(missing_ok=True)
    log, environment = work / f"{row}.log", dict(os.environ)
    if row.startswith("unsloth"):
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
        environment["UNSLOTH_COMPILE_LOCATION"] = str(work / "unsloth_compiled_cache")
        paths = [str(options.unsloth.resolve()) if options.unsloth else "", environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.call(
            [sys.executable, "-m", "benchmarks.train", *command],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if status:
        return {"failed": f"status {status}: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}"}
    result: dict[str, Any] = read_json(work / f"{row}.json", "run the benchmark again")
    return result


def chosen(systems: tuple[System, ...], options: argparse.Namespace) -> tuple[System, ...]:
    """The rows that are asked for; without --only not those of unsloth or Liger where it is missing, which is said.

    Raises:
        UsageError: there is no such row.
        KestrelError: one of them needs a package that is not installed.
    """
    from kestrel.errors import KestrelError, UsageError

    known = [system.name for system in systems]
    if unknown := sorted(set(options.only or ()) - set(known)):
        raise UsageError([f"--only {' '.join(unknown)}: this profile's rows are {', '.join(known)}"])
    asked = [system for system in systems if not options.only or system.name in options.only]
    missing = {system.name: package for system in asked if (package := missing_package(system, options))}
    for package in dict.fromkeys(missing.values()):
        rows = ", ".join(name for name in missing if missing[name] == package)
        if package == "trl":
            raise KestrelError(
                "TRL is not installed: pip install -r benchmarks/requirements.txt, or name other rows with --only"
            )
        if options.only:
            raise KestrelError(f"{package} is not installed, which {rows} needs: see benchmarks/README.md")
        print(f"note: {package} is not installed (see benchmarks/README.md), so {rows} are left out", flush=True)
    return tuple(system for system in asked if system.name not in missing)


def missing_package(system: System, options: argparse.Namespace) -> str | None:
    """The package that a row needs and that is not installed, if any."""
    if system.kind == "unsloth":
        there = options.unsloth and (options.unsloth / "unsloth").is_dir() or find_spec("unsloth")
        return None if there else "unsloth"
    if system.kind.startswith("trl") and not find_spec("trl"):
        return "trl"
    return "liger-kernel" if system.options.get("use_liger_kernel") and not find_spec("liger_kernel") else None


def benchmark(options: argparse.Namespace, work: Path, command: str) -> list[str]:
    """Measures row after row.

    Returns:
        The rows that should have been timed and were not.

    Raises:
        UsageError: there is no shape, or no row, of a name that is asked for.
        KestrelError: TRL is not installed, or what all of them need could not be made.
    """
    from benchmarks.rows import row_of, table
    from benchmarks.shape_profiles import profile_of
    from benchmarks.shapes import SHAPES
    from kestrel.errors import KestrelError, UsageError
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    if options.shape not in (None, *SHAPES):
        raise UsageError([f"--shape {options.shape}: the shapes are {', '.join(SHAPES)}"])
    systems = chosen(profile_of(options.profile, options.shape).systems, options)
    facts = start(_PREPARE, options, work)
    if "tokens" not in facts:
        raise KestrelError(f"the model, the rows or the reference could not be made: {facts.get('failed', facts)}")
    print(
        f"{facts['device']}: {facts['matrix_flops'] / 1e12:.2f} TFLOP/s in {facts['compute_dtype']}; {options.shape or 'a Falcon'} of "
        f"{facts['parameters'] / 1e6:,.1f}M parameters; {facts['dialogues']:,} dialogues, {facts['replies']:,} replies, "
        f"{facts['tokens']:,} tokens, {facts['supervised_tokens'] / facts['tokens']:.1%} supervised",
        flush=True,
    )
    record = {
        "command": command,
        **facts,
        "versions": library_versions() | versions_of("trl", "liger_kernel"),
        "commit": git_commit(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "rows": [],
    }
    for system in systems:
        if options.steps:
            system = replace(system, warmup=1, steps=options.steps)
        while True:
            instead = {name: getattr(system, name) for name in ("batch_size", "passes", "warmup", "steps")}
            result = start(system.name, options, work, dtype=facts["compute_dtype"], instead=json.dumps(instead))
            if not result.get("out_of_memory") or system.batch_size in (None, 1):
                break
            system = replace(system, batch_size=system.batch_size // 2, passes=system.passes * 2)
        record["rows"].append(row_of(system, result, facts))
        print(f"{system.name}: {result}", flush=True)
        if options.output:
            write_json(options.output, record)
    print(f"\n{table(record)}")
    # That packing mixes dialogues is a finding; anything else that is missing is a failure.
    return [
        r["name"]
        for r in record["rows"]
        if "epoch_seconds" not in r and not (r["kind"] == "trl-packed" and "disagrees" in r)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--profile", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--shape", metavar="NAME", help="a model of benchmarks/shapes.py, such as qwen2.5-7b")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="rows to measure (all)")
    parser.add_argument("--model", type=Path, help="folder of the model; written where there is none (a temporary one)")
    parser.add_argument(
        "--layers", type=at_least_one, help="decoder layers of a model that is written: fewer for a trial"
    )
    parser.add_argument("--steps", type=at_least_one, help="steps timed of each row, for a trial")
    parser.add_argument("--unsloth", type=Path, metavar="FOLDER", help="where unsloth and what it needs are installed")
    parser.add_argument("--work", type=Path, help="folder to work in, with each process's log (a temporary one)")
    for hidden in ("--row", "--dtype", "--instead"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.row:
        return one_process(options)

    def measured() -> int:
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            missing = benchmark(options, work, command_of("train.py", argv))
        if missing:
            print(f"error: not timed: {', '.join(missing)}; the JSON and --work's logs say why", file=sys.stderr)
        return 1 if missing else 0

    return told(measured)


if __name__ == "__main__":
    sys.exit(main())
