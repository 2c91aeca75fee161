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
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, require_equal, with_own_hash

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
                    status = os.fstat(file.fileno())
                    if not stat.S_ISREG(status.st_mode):
                        raise KestrelError(f"{folder / name} is not a regular file; {remedy}")
                    if status.st_nlink > 1:
                        raise KestrelError(
                            f"{folder / name} is a hard link: it has another name too, which could be a file that is not to "
                            "be published; copy the run folder with cp -r and publish the copy"
                        )
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


@dataclass(frozen=True)
class RunRecords:
    """What a run records about its adapter.

    Attributes:
        adapter, dataset: the manifests.
        counts: of the train split, as in the data set's statistics.json.
        metrics: metrics.json without anything local; None if the adapter was not evaluated.
        generation: the settings of the answers that were scored.
    """

    adapter: Mapping[str, Any]
    dataset: Mapping[str, Any]
    counts: Mapping[str, Any]
    metrics: dict[str, Any] | None
    generation: Mapping[str, Any]


def read_records(
    settings: Settings, prompt: Prompt, adapter: dict[str, Any], identities: set[str], again: str
) -> RunRecords:
    """Reads the records of the data set that the adapter was trained on, and of its evaluation.

    Args:
        adapter: its manifest.
        identities: of the adapter; the answers that were scored must come from one of them.

    Raises:
        KestrelError: the run holds another data set, so the card could not describe the right one; or an evaluation that
            is damaged, or of other answers, another adapter or other settings.
    """
    command = f"python preprocess.py {again}"
    folder, dataset = open_dataset(settings, prompt, command)
    if identity_of(dataset) != adapter["made_from"].get("dataset"):
        raise KestrelError(
            f"the adapter was trained on another data set than the one in {folder}; make that one again with: {command}, "
            f"or train on this one with: python train.py {again}"
        )
    counts = read_json(folder / "statistics.json", f"make it again with: {command}")["splits"]["train"]
    return RunRecords(adapter, dataset, counts, *_evaluation_of(settings, identities, again))


def _evaluation_of(
    settings: Settings, identities: set[str], again: str
) -> tuple[dict[str, Any] | None, Mapping[str, Any]]:
    """The public part of metrics.json, and the settings of the answers; None if there is none."""
    run = Path(settings.run_dir)
    path = run / "evaluation" / "metrics.json"
    if not path.is_file():
        return None, {}
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
    if metrics != with_own_hash(metrics):
        raise KestrelError(f"{path} was edited, or is of an earlier version: its own sha256 does not match; {remedy}")
    if made_from is None:
        raise KestrelError(f"{path} scores answers that generate.py has replaced or removed since; {remedy}")
    if made_from.get("adapter") not in identities:
        raise KestrelError(f"{path} scores another adapter than the one in {run / 'adapter'}; {remedy}")
    generation = made_from["generation"]
    then = {"generation": generation, "seed": made_from["seed"], "evaluation": _scored_with(metrics)}
    scored_with = {"normalization", "resamples", "stemmer"}
    now = settings.model_dump(include={"generation": set(generation), "seed": True, "evaluation": scored_with})
    require_equal(f"the evaluation in {path}", then, now, f"publish with the same ones, or {remedy}")
    return public, generation


def _scored_with(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the evaluation, as its signatures record them; what they do not record is None."""
    rouge_l = metrics["systems"]["adapter"].get("rouge_l", {}).get("signature", "")
    words = dict(word.partition(":")[::2] for word in f"{metrics['signature']}|{rouge_l}".split("|"))
    resamples, stemmer = words.get("resamples", ""), {"yes": True, "no": False}.get(words.get("stemmer", ""))
    return {"normalization": metrics["normalization"], "resamples": int(resamples or 0), "stemmer": stemmer}
