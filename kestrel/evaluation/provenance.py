"""Whether generations match their run and each other: what manifests record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kestrel.adapter.source import adapter_identity
from kestrel.errors import KestrelError
from kestrel.evaluation.generations import Generations
from kestrel.generation.files import order_in_name, recorded_files, split_and_system
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, sha256_of

# What may differ between the files of one run, and between seeds of one experiment.
_OWN = ("system", "adapter", "persona_order", "seed")
# Settings of generation that say what is answered and scored, not how.
_SCOPE = ("max_dialogues", "other_personas", "candidates")


def check_provenance(
    run_dir: Path, adapter: Path | None, files: Sequence[Path], command: str, decoding: Mapping[str, Any]
) -> None:
    """Refuses generations of the run that were edited, or were not made as its dataset, adapter and settings are now.

    Its files must agree with each other on all that decides, but for the system and the order of the persona.

    Args:
        decoding: the settings of generation, of which those that were recorded must be equal.
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
        _, order = order_in_name(split_and_system(file)[1])
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
        made = facts["made_from"].get("generation", {})
        how = {"made": made, "asked": decoding}
        if asked := _differences({kind: _without(values, _SCOPE) for kind, values in how.items()}):
            key, values = next(iter(asked.items()))
            raise KestrelError(
                f"{file} was generated with generation.{key} {values['made']}, and now it is {values['asked']}; {remedy}, "
                "or leave the setting as it was"
            )
        first = recorded.get(files[0].name)
        if first is not None and (others := _differences({"a": _decisive(first), "b": _decisive(facts)})):
            raise KestrelError(
                f"{file} was generated with another {next(iter(others))} than {files[0].name}, with which it would be "
                f"compared; {remedy}"
            )


def _without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def experiment_of(file: Generations) -> dict[str, Any]:
    """What is recorded of how a file was made, and its adapter trained, but for the seeds; empty where nothing is.

    A file that was changed since has no record.
    """
    folder = file.path.parent
    if not (folder / MANIFEST).exists():
        return {}
    facts = recorded_files(folder, f"delete {folder / MANIFEST} to score the files without it").get(file.path.name)
    if facts is None or facts["sha256"] != file.sha256:
        return {}
    experiment = _decisive(facts)
    trained = folder.parent / "adapter"
    if "adapter" in facts["made_from"] and (trained / MANIFEST).exists():
        manifest = read_manifest(trained, "adapter", f"delete {trained / MANIFEST}", check_files=False)
        if identity_of(manifest) == facts["made_from"]["adapter"]:
            settings = {
                key: value for key, value in manifest["settings"].items() if key not in ("seed", "quantization")
            }
            experiment |= settings
    return experiment


def difference_notes(files: Sequence[Generations]) -> list[str]:
    """A warning where files were made in different ways, with what differs: it is compared along with the systems."""
    experiments = {file.system: experiment_of(file) for file in files}
    differences = []
    for key, values in _differences({name: facts for name, facts in experiments.items() if facts}).items():
        shown = "; ".join(f"{name}: {value}" for name, value in values.items())
        differences.append(f"{key} ({shown})" if len(shown) < 80 else key)
    if not differences:
        return []
    return [f"WARNING: the files were not made alike, and the scores compare that too: {', '.join(differences)}."]


def same_experiment(files: Sequence[Generations]) -> bool:
    """Whether nothing that is recorded tells the files apart but seeds."""
    return not _differences({str(i): experiment_of(file) for i, file in enumerate(files)})


def _decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts["made_from"].items() if key not in _OWN}


def _differences(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keys, dotted, that all records have with different values, and the values by record."""
    flat = {name: _flat(record) for name, record in records.items()}
    shared = set.intersection(*(set(record) for record in flat.values())) if flat else set()
    found = {}
    for key in sorted(shared):
        values = {name: record[key] for name, record in flat.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            found[key] = values
    return found


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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
