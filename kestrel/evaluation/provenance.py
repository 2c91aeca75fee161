"""Whether a run's own generations still match its dataset, adapter and log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kestrel.adapter.source import adapter_identity
from kestrel.errors import KestrelError
from kestrel.generation.files import name_in_order, order_in_name, recorded_files, split_and_system
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, sha256_of


def check_provenance(run_dir: Path, adapter: Path | None, files: Sequence[Path], command: str) -> None:
    """Refuses generations of the run that were edited, or whose dataset or adapter was made again since.

    A file in another order of the persona must differ in nothing but the order from the one in the order as given.

    Args:
        adapter: folder of the adapter that the settings name; None where it is not on this machine.
        files: of run_dir/generations.
        command: the command that makes them.

    Raises:
        KestrelError: naming the file and what changed.
    """
    folder = run_dir / "generations"
    again = f"make it again with: {command}"
    recorded = recorded_files(folder, again)
    current = _current_identities(run_dir, adapter, again)
    for file in files:
        system, order = order_in_name(split_and_system(file)[1])
        remedy = f"{again} --generation.persona_orders {order + 1}, or delete it" if order else again
        facts = recorded.get(file.name)
        if facts is None:
            raise KestrelError(f"{file} is not in {folder / MANIFEST}; {remedy}, or name it in evaluation.generations")
        if sha256_of(file) != facts["sha256"]:
            raise KestrelError(
                f"{file} was changed since it was generated; {remedy}, or name it in evaluation.generations"
            )
        for kind, identity in current.items():
            if facts["made_from"].get(kind, identity) != identity:  # the base was made from no adapter
                raise KestrelError(f"{file} was generated from another {kind} than the run has now; {remedy}")
        given = recorded.get(file.name.replace(name_in_order(system, order), system))
        if order and given is not None and facts["made_from"] != given["made_from"] | {"persona_order": order}:
            raise KestrelError(
                f"{file} was generated with other settings than {system} with the persona as given; {remedy}"
            )


def _current_identities(run_dir: Path, adapter: Path | None, remedy: str) -> dict[str, Any]:
    """Of the run's dataset and of the adapter, where they are on this machine; checks the log of its training too."""
    identities: dict[str, Any] = {}
    if (run_dir / "dataset" / MANIFEST).exists():
        identities["dataset"] = identity_of(read_manifest(run_dir / "dataset", "dataset", remedy, check_files=False))
    if adapter == run_dir / "adapter":
        if (adapter / MANIFEST).exists():
            manifest = read_manifest(adapter, "adapter", remedy, check_files=False)
            identities["adapter"] = identity_of(manifest)
            _check_log(run_dir / "logs" / "training.jsonl", manifest)
    elif adapter is not None and (identity := adapter_identity(adapter)):
        identities["adapter"] = identity
    return identities


def _check_log(log: Path, adapter: Mapping[str, Any]) -> None:
    """Refuses a log, which the report draws, that is not the one of the adapter's training."""
    if log.exists() and adapter.get("training_log", sha256_of(log)) != sha256_of(log):
        raise KestrelError(
            f"{log} was changed since the adapter was trained, or is of another training; run train.py, which writes "
            "it again, or delete it, and the report has no loss curve"
        )
