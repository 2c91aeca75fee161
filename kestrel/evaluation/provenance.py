"""Whether a run's own generations still are what its other artifacts say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kestrel.artifacts import MANIFEST, identity_of, read_json, sha256_of
from kestrel.errors import KestrelError


def check_provenance(run_dir: Path, adapter: Path, files: Sequence[Path], command: str) -> None:
    """Refuses generations of the run that were edited, or whose dataset or adapter has been made anew since.

    Args:
        run_dir: the run's folder.
        adapter: folder of the adapter that the settings name.
        files: of run_dir/generations.
        command: the command that makes them.

    Raises:
        KestrelError: naming the file and what changed.
    """
    folder = run_dir / "generations"
    remedy = f"make it again with: {command}"
    recorded = read_json(folder / MANIFEST, remedy).get("generations", {})
    now = {}
    for kind, artifact in (("dataset", run_dir / "dataset"), ("adapter", adapter)):
        if (artifact / MANIFEST).exists():
            now[kind] = identity_of(read_json(artifact / MANIFEST, remedy))
    for file in files:
        facts = recorded.get(file.name)
        if facts is None:
            raise KestrelError(f"{file} is not in {folder / MANIFEST}; {remedy}, or name it in evaluation.generations")
        if sha256_of(file) != facts["sha256"]:
            raise KestrelError(
                f"{file} was changed since it was generated; {remedy}, or name it in evaluation.generations"
            )
        for kind, identity in now.items():
            if facts["made_from"].get(kind, identity) != identity:  # the base was made from no adapter
                raise KestrelError(f"{file} was generated from another {kind} than the run's is now; {remedy}")
