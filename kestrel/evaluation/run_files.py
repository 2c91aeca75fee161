"""Which generation files are scored: those that are named, a run's own, or those of several runs that are compared."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kestrel.adapter.source import find_local_adapter
from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.evaluation.provenance import check_provenance
from kestrel.generation.files import split_and_system


def runs_of(settings: Settings) -> list[Path]:
    """The runs that are compared, or the run itself."""
    return [Path(name) for name in settings.evaluation.compare] or [Path(settings.run_dir)]


def files_to_score(settings: Settings, again: str) -> list[Path]:
    """The files, which for those of a run are checked against what they were made from.

    Args:
        again: the options of this call, which a message repeats.

    Raises:
        KestrelError: a run has no generations of the split, or its files do not fit the rest of it.
    """
    if settings.evaluation.generations:
        return [Path(name) for name in settings.evaluation.generations]
    files: list[Path] = []
    runs = runs_of(settings)
    if len({run.resolve() for run in runs}) < len(runs):
        raise KestrelError(
            f"evaluation.compare names a run twice ({', '.join(map(str, runs))}); name different run folders"
        )
    for run in runs:
        own = run == Path(settings.run_dir)
        made = sorted((run / "generations").glob(f"{settings.generation.split}.*.jsonl"))
        if not made:
            raise KestrelError(
                f"{run / 'generations'} has no generations of split {settings.generation.split}; run generate.py first, "
                "or name files with --evaluation.generations"
            )
        adapter: Path | None = run / "adapter"
        if own and settings.model.adapter:
            adapter = find_local_adapter(settings.model.adapter)
            if adapter is None:
                print(
                    f"note: {settings.model.adapter} is not on this machine, so whether it made these is not checked",
                    file=sys.stderr,
                )
        command = f"python generate.py {again if own else f'--config {run}/config.yaml'}"
        check_provenance(run, adapter, made, command, settings.generation.model_dump() if own else {})
        files += made
    return files


_OF_A_REPORT = re.compile(r"metrics\.json|report\.(html|md)|responses|\w+\.png")


def _visible_first(name: str) -> tuple[bool, str]:
    return name.startswith("."), name


def _require_replaceable(folder: Path) -> Path:
    folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise KestrelError(f"evaluation.output {folder} is a file; name a new or empty folder")
    present = sorted((path.name for path in folder.iterdir()), key=_visible_first) if folder.is_dir() else []
    others = [name for name in present if not _OF_A_REPORT.fullmatch(name)]
    if others or (present and "metrics.json" not in present):
        raise KestrelError(
            f"evaluation.output {folder}: the folder holds {', '.join((others or present)[:3])}, which would be deleted; name a "
            "new or empty folder"
        )
    return folder


def output_folder(settings: Settings, beside: Path, paths: Sequence[Path]) -> Path:
    """Where the report goes: evaluation, comparison, or of files that are named evaluation-NAMES.

    Raises:
        KestrelError: evaluation.output holds something else than an older report, which would be replaced as a whole.
    """
    options = settings.evaluation
    if options.output:
        return _require_replaceable(Path(options.output))
    if not options.generations:
        return beside / ("comparison" if options.compare else "evaluation")
    names = list(dict.fromkeys(split_and_system(path)[1] for path in paths))
    more = [] if len(names) < 4 else [f"and-{len(names) - 3}-more"]
    return beside / re.sub(r"[^\w@.+-]+", "_", "-".join(["evaluation", *names[:3], *more]))[:120]
