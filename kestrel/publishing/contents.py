"""The files of a run that are published: a fixed list, without paths of this machine, and the card.

Dialogues, checkpoints, generations, reports and logs are never published.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kestrel.adapter.source import ADAPTER_FILES, CONFIG, PROMPT
from kestrel.config.resolve import describe
from kestrel.config.settings import Settings, is_hub_id
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer
from kestrel.publishing.model_card import CardFacts, model_card
from kestrel.publishing.upload import CARD, base_config
from kestrel.publishing.usage import example_prompt
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, require_equal, require_made, sealed
from kestrel.training.checkpoints import DECISIVE_TRAINING_SETTINGS

_METRICS = ("signature", "split", "n_replies", "n_dialogues", "normalization", "paired_test", "paired", "verdicts")


def files_to_publish(settings: Settings, repo_id: str, again: str) -> dict[str, bytes]:
    """The content of each file by name, read once, so that exactly what is checked and shown is sent.

    Args:
        settings: of the run; those that shaped the training must not have changed since.
        repo_id: the repository to publish to.
        again: the options of this call, for messages.

    Raises:
        KestrelError: no adapter, a damaged one, one of other settings, a folder with other files or links, or an
            evaluation of another adapter.
    """
    run, base = Path(settings.run_dir), base_on_hub(settings)
    folder, remedy = run / "adapter", f"train it again with: python train.py {again}"
    require_made(folder, "adapter", f"train it with: python train.py {again}")
    manifest = read_manifest(folder, "adapter", remedy, check_files=False)
    files = read_adapter_files(folder, manifest["files"], remedy)
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    _require_settings_of_training(settings, manifest, folder, remedy)
    prompts = {"prompt": json.loads(files[PROMPT])}, {"prompt": prompt.identity()}
    require_equal(f"the adapter in {folder}", *prompts, remedy)

    commit = (manifest["made_from"].get("base") or {}).get("commit")
    files[CONFIG] = _json({**json.loads(files[CONFIG]), "base_model_name_or_path": base, "revision": commit})
    digests = {**manifest["files"], CONFIG: hashlib.sha256(files[CONFIG]).hexdigest()}
    public_manifest = {**manifest, "base_model": {**manifest["base_model"], "name": base}, "files": digests}
    files[MANIFEST] = _json(sealed(public_manifest))
    # generate.py may have had the same adapter from this folder or, published before, from the Hub.
    metrics = evaluation_of(run, {identity_of(manifest), identity_of(public_manifest)}, f"python evaluate.py {again}")
    if metrics is not None:
        files["metrics.json"] = _json(metrics)
    public = public_settings(settings, base)
    files["config.yaml"] = describe(public, {}).encode()
    for name, content in files.items():
        if name.endswith((".json", ".jinja", ".yaml")):
            _refuse_private_text(name, content)
    facts = CardFacts(
        repo_id=repo_id,
        base=base,
        is_falcon=base_config(settings.model.name, settings.model.revision).get("model_type") == "falcon",
        license=settings.hub.license,
        language=settings.hub.language,
        datasets=datasets_on_hub(settings),
        data_name=public.data.source,
        manifest=manifest,
        statistics=_train_statistics(run, manifest),
        metrics=metrics,
        example=example_prompt(prompt),
    )
    files[CARD] = model_card(facts).encode()
    return files


def read_adapter_files(folder: Path, digests: Mapping[str, str], remedy: str) -> dict[str, bytes]:
    """The content of the adapter's files, opened without following links.

    Args:
        folder: of the adapter; it may hold these files and its manifest, and nothing else.
        digests: the sha256 of each file, as the manifest records it.
        remedy: what to do about a damaged adapter, for messages.

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
                raise KestrelError(
                    f"{folder} holds {', '.join(map(repr, others[:5]))}; only what train.py wrote there is published, so "
                    "move other files away"
                )
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
                f"{folder / name} is damaged or was edited: its sha256 is not the recorded one; {remedy}"
            )
    return files


def _require_settings_of_training(settings: Settings, manifest: Mapping[str, Any], folder: Path, remedy: str) -> None:
    """Refuses settings that are not those the adapter was trained with."""

    def decisive(of: Mapping[str, Any]) -> dict[str, Any]:
        training = {name: of["training"].get(name) for name in DECISIVE_TRAINING_SETTINGS}
        return {"training": training, **{name: of.get(name) for name in ("quantization", "lora", "seed")}}

    require_equal(
        f"the adapter in {folder}",
        decisive(manifest["settings"]),
        decisive(settings.model_dump()),
        f"publish it with the settings it was trained with, or {remedy}",
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def base_on_hub(settings: Settings) -> str:
    """The base's id on the Hub.

    Raises:
        KestrelError: it is a folder of this machine, which nobody else could load.
    """
    name = settings.model.name
    if settings.hub.base_model or not _is_local(name):
        return settings.hub.base_model or name
    raise KestrelError(
        f"model.name {name} is a folder of this machine; name the base on the Hub that it is a copy of: "
        "--hub.base_model owner/name"
    )


def datasets_on_hub(settings: Settings) -> list[str]:
    """Ids of the training data."""
    source = settings.data.source
    return list(settings.hub.datasets) or ([] if _is_local(source) else [source])


def _is_local(name: str) -> bool:
    return Path(name).exists() or not is_hub_id(name)


def public_settings(settings: Settings, base: str) -> Settings:
    """The settings as others can use them: the base by its id on the Hub, no path of this machine."""
    source = settings.data.source
    return settings.model_copy(
        update={
            "run_dir": f"runs/{Path(settings.run_dir).name}",
            "data": settings.data.model_copy(update={"source": Path(source).name if _is_local(source) else source}),
            "model": settings.model.model_copy(update={"name": base, "adapter": None}),
            "training": settings.training.model_copy(update={"resume": "auto"}),
            "evaluation": settings.evaluation.model_copy(update={"generations": [], "extra_metrics": []}),
        }
    )


def _refuse_private_text(name: str, text: bytes) -> None:
    """The last check: nothing that is published names this machine's folders or the Hub's token."""
    tokens = [os.environ.get(key, "") for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    if any(token and token.encode() in text for token in tokens):
        raise KestrelError(f"{name} contains the Hub's token; remove it from the settings")
    for path in {str(Path.home()), os.getcwd()}:
        if len(path) > 1 and re.search(rb"[\"' ]" + re.escape(path.encode()) + rb"(?:/|\b)", text):
            raise KestrelError(f"{name} names a folder of this machine, {path}, and is not published")


def evaluation_of(run: Path, identities: set[str], command: str) -> dict[str, Any] | None:
    """The run's metrics without anything local; None if it was not evaluated.

    Args:
        run: its folder.
        identities: of the adapter; the answers that were scored must come from one of them.
        command: evaluates again, for messages.

    Raises:
        KestrelError: the metrics are damaged, or score other answers or another adapter.
    """
    path = run / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    remedy = f"delete {path.parent}, or run generate.py and {command}"
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
    return public


def _train_statistics(run: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counts of the train split, if the run still holds the data set that the adapter was trained on."""
    folder = run / "dataset"
    if not (folder / MANIFEST).is_file():
        return None
    dataset = read_manifest(folder, "dataset", "make it with preprocess.py", check_files=False)
    if identity_of(dataset) != manifest["made_from"].get("dataset"):
        return None
    counts: dict[str, Any] = read_json(folder / "statistics.json", "make it with preprocess.py")["splits"]["train"]
    return counts
