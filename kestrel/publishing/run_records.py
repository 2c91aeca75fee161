"""What a run records about its adapter: files, data set, scores. Each must fit the adapter and the settings."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.adapter.source import ADAPTER_FILES
from kestrel.config.settings import Settings
from kestrel.data.dataset import open_dataset
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, require_equal
from kestrel.training.checkpoints import DECISIVE_TRAINING_SETTINGS

_METRICS = ("signature", "split", "n_replies", "n_dialogues", "normalization", "paired_test", "paired", "verdicts")


def read_adapter_files(folder: Path, digests: Mapping[str, str], remedy: str) -> dict[str, bytes]:
    """The content of the adapter's files and its manifest, opened without following links.

    Args:
        digests: the sha256 of each file, as the manifest records it.

    Raises:
        KestrelError: the folder holds another file, or one that is missing, changed, or not a regular file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would otherwise wait for a writer
    files = {}
    try:
        handle = os.open(folder, flags | os.O_DIRECTORY)
        try:
            own = {MANIFEST, *(digests.keys() & set(ADAPTER_FILES))}
            if others := sorted({*os.listdir(handle), *digests} - own):
                listed = ", ".join(map(repr, others[:5]))
                raise KestrelError(f"{folder} holds {listed}; only files of train.py are published, move others away")
            for name in own:
                with open(os.open(name, flags, dir_fd=handle), "rb") as file:
                    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        raise KestrelError(f"{folder / name} is not a regular file; {remedy}")
                    files[name] = file.read()
        finally:
            os.close(handle)
    except OSError as error:
        name = error.filename if error.filename not in (None, str(folder), folder) else "."
        reason = "it is a link" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise KestrelError(f"{folder / str(name)} cannot be published: {reason}; {remedy}") from None
    for name, digest in digests.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise KestrelError(
                f"{folder / name} is damaged or was edited: it does not have the recorded sha256; {remedy}"
            )
    return files


def decisive_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that shape an adapter, besides the prompt."""
    training = {name: settings["training"].get(name) for name in DECISIVE_TRAINING_SETTINGS}
    return {"training": training, **{name: settings.get(name) for name in ("quantization", "lora", "seed")}}


def train_statistics(settings: Settings, prompt: Prompt, manifest: Mapping[str, Any], again: str) -> dict[str, Any]:
    """Counts of the train split of the data set that the adapter was trained on.

    Raises:
        KestrelError: the run does not hold that data set, so the card could not describe it.
    """
    command = f"python preprocess.py {again}"
    folder, dataset = open_dataset(settings, prompt, command)
    if identity_of(dataset) != manifest["made_from"].get("dataset"):
        raise KestrelError(
            f"the adapter was trained on another data set than the one in {folder}; make that one again with: {command}, "
            f"or train on this one with: python train.py {again}"
        )
    counts: dict[str, Any] = read_json(folder / "statistics.json", f"make it again with: {command}")["splits"]["train"]
    return counts


def base_commit(manifest: Mapping[str, Any]) -> str | None:
    """The base's commit on the Hub, where the adapter's manifest records one."""
    commit: str | None = (manifest["made_from"].get("base") or {}).get("commit")
    return commit


@dataclass(frozen=True)
class PublicEvaluation:
    """What is published of an evaluation.

    Attributes:
        metrics: metrics.json without anything local.
        generation: the settings of the adapter's answers.
    """

    metrics: dict[str, Any]
    generation: dict[str, Any]


def evaluation_of(settings: Settings, identities: set[str], again: str) -> PublicEvaluation | None:
    """The run's evaluation; None if it has none.

    Args:
        identities: of the adapter; the answers that were scored must come from one of them.

    Raises:
        KestrelError: the metrics are damaged, or score other answers, another adapter or other settings.
    """
    run = Path(settings.run_dir)
    path = run / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    remedy = f"delete {path.parent}, or run generate.py and then: python evaluate.py {again}"
    metrics = read_json(path, remedy)
    generations = read_manifest(run / "generations", "generations", remedy, check_files=False).get("generations", {})
    recorded = {facts["sha256"]: facts["made_from"] for facts in generations.values()}
    try:
        inputs = {entry["system"]: entry["sha256"] for entry in metrics["inputs"]}
        made_from = recorded.get(inputs["adapter"])
        public = {name: metrics[name] for name in _METRICS}
        public["systems"] = {
            name: {key: value for key, value in entry.items() if key != "made_by"}
            for name, entry in metrics["systems"].items()
        }
    except (KeyError, TypeError) as error:
        raise KestrelError(f"{path} is damaged or scores no adapter ({error}); {remedy}") from None
    if made_from is None:
        raise KestrelError(f"{path} scores answers that generate.py has replaced or removed since; {remedy}")
    if made_from.get("adapter") not in identities:
        raise KestrelError(f"{path} scores another adapter than the one in {run / 'adapter'}; {remedy}")
    generation, normalization = made_from["generation"], {"normalization": metrics["normalization"]}
    then = {"generation": generation, "seed": made_from["seed"], "evaluation": normalization}
    now = settings.model_dump(include={"generation": set(generation), "seed": True, "evaluation": {"normalization"}})
    require_equal(f"the evaluation in {path}", then, now, f"publish with the same ones, or {remedy}")
    return PublicEvaluation(public, generation)
