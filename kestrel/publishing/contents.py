"""The files of a run that are published: a fixed list, without paths of this machine, and the card.

Dialogues, checkpoints, generations, reports and logs are never published.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kestrel.adapter.source import CONFIG, PROMPT, WEIGHTS
from kestrel.config.resolve import describe
from kestrel.config.settings import DECISIVE_TRAINING_SETTINGS, Settings, is_hub_id
from kestrel.errors import KestrelError
from kestrel.model.defaults import settings_for
from kestrel.prompt.load import load_prompt
from kestrel.publishing.model_card import model_card
from kestrel.publishing.run_records import read_adapter_files, read_records
from kestrel.publishing.upload import CARD, base_config
from kestrel.publishing.usage import example_prompt
from kestrel.runtime.manifest import (
    MANIFEST,
    identity_of,
    read_manifest,
    require_artifact,
    require_equal,
    with_own_hash,
)


def files_to_publish(settings: Settings, again: str) -> dict[str, bytes]:
    """The content of each file by name, read once, so that exactly what is checked and shown is sent.

    Raises:
        KestrelError: no adapter, a damaged one, one trained with other settings, a folder with other files or links, or
            an evaluation of another adapter.
    """
    run, base = Path(settings.run_dir), base_on_hub(settings)
    folder, remedy = run / "adapter", f"train it again with: python train.py {again}"
    require_artifact(folder, "adapter", f"train it with: python train.py {again}")
    manifest = read_manifest(folder, "adapter", remedy, check_files=False)
    files = read_adapter_files(folder, manifest["files"], remedy)
    prompt, config = load_prompt(settings), base_config(settings.model.name, settings.model.revision)
    settings = settings_for(settings, config)
    then = {**_decisive(manifest["settings"]), "prompt": json.loads(files[PROMPT])}
    now = {**_decisive(settings.model_dump()), "prompt": prompt.identity()}
    require_equal(f"the adapter in {folder}", then, now, f"publish it with its own settings, or {remedy}")

    named = {"base_model_name_or_path": base, "revision": manifest["made_from"].get("base", {}).get("commit")}
    files[CONFIG] = _json({**json.loads(files[CONFIG]), **named})
    digests = {**manifest["files"], CONFIG: hashlib.sha256(files[CONFIG]).hexdigest()}
    public_manifest = {**manifest, "base_model": {**manifest["base_model"], "name": base}, "files": digests}
    files[MANIFEST] = _json(with_own_hash(public_manifest))
    # generate.py may have had the same adapter from this folder or, published before, from the Hub.
    records = read_records(settings, prompt, manifest, {identity_of(manifest), identity_of(public_manifest)}, again)
    if records.metrics is not None:
        files["metrics.json"] = _json(records.metrics)
    public = public_settings(settings, base)
    files["config.yaml"] = describe(public, {}).encode()
    is_falcon = config.get("model_type") == "falcon"
    files[CARD] = model_card(public, records, datasets_on_hub(settings), is_falcon, example_prompt(prompt)).encode()
    for name, content in files.items():
        if name != WEIGHTS:
            refuse_private_text(name, content)
    return files


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that shape an adapter, besides the prompt."""
    training = {name: settings["training"].get(name) for name in DECISIVE_TRAINING_SETTINGS}
    return {"training": training, **{name: settings.get(name) for name in ("quantization", "lora", "seed")}}


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
    """The settings as others can use them: the base by its id on the Hub, no path of this machine, nobody's name or persona."""
    source, begun = settings.data.source, settings.training.init_adapter
    name = Path(source).name if _is_local(source) else source
    data: dict[str, Any] = {"source": name, "dataset": None, "self": None, "persona": []}
    template = settings.prompt.chat_template and "chat_template.jinja"  # of the adapter's tokenizer
    training = {"resume": "auto", "init_adapter": begun and (Path(begun).name if _is_local(begun) else begun)}
    local: dict[str, Any] = {key: [] for key in ("generations", "compare", "extra_metrics", "judgements")} | {
        "output": None,
        "nli": None,
    }
    return settings.model_copy(
        update={
            "run_dir": f"runs/{Path(settings.run_dir).name}",
            "data": settings.data.model_copy(update=data),
            "prompt": settings.prompt.model_copy(update={"chat_template": template}),
            "model": settings.model.model_copy(update={"name": base, "adapter": None}),
            "training": settings.training.model_copy(update=training),
            "evaluation": settings.evaluation.model_copy(update=local),
        }
    )


def refuse_private_text(name: str, text: bytes) -> None:
    """The last check: nothing that is published names this machine's folders or the Hub's token."""
    from huggingface_hub import get_token

    tokens = [get_token(), *map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))]
    if any(token and token.encode() in text for token in tokens):
        raise KestrelError(f"{name} contains the Hub's token; remove it from the settings")
    for path in {str(Path.home()), os.getcwd()}:
        if len(path) > 1 and re.search(rb"(?<![\w/])" + re.escape(path.encode()) + rb"(?:/|\b)", text):
            raise KestrelError(f"{name} names a folder of this machine, {path}, and is not published")
