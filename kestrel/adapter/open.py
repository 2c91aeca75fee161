"""Opens the adapter that the settings name: the run's own, one in a folder, or one on the Hub.

Kestrel's adapters record their prompt, their base and a likelihood, and are checked against all three. Of other adapters
only the base's name and the shapes of the weights can be checked.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from kestrel.adapter.lora import adapter_config
from kestrel.adapter.source import (
    PROMPT,
    find_adapter,
    foreign_manifest,
    is_made_by_kestrel,
    repair_advice,
    require_files,
)
from kestrel.adapter.weights import check_weights
from kestrel.config.settings import DECISIVE_TRAINING_SETTINGS, Settings, is_hub_id
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt
from kestrel.runtime.atomic import read_json
from kestrel.runtime.manifest import MANIFEST, differences, read_manifest, require_equal

_FIT = (
    "set the run's settings to the adapter's (for another base: model.name, and model.revision to its commit; for another "
    "prompt: prompt.format, then run preprocess.py again)"
)


def open_adapter(settings: Settings, prompt: Prompt, base: dict[str, Any], command: str) -> tuple[Path, dict[str, Any]]:
    """Finds the adapter and checks all that can be checked before anything large is loaded.

    Args:
        base: from `base_identity`.
        command: the command that trains an adapter, for messages.

    Returns:
        Its folder and its manifest; for an adapter from elsewhere, a manifest of what is known, of another kind.

    Raises:
        KestrelError: missing, damaged, or trained with another base, prompt or rank; naming what differs.
    """
    name, ours = settings.model.adapter, _compared(settings.lora.model_dump())
    expected = {"prompt": prompt.identity(), "quantization": settings.quantization.model_dump(), "base": base}
    if name is None:
        folder, remedy = Path(settings.run_dir) / "adapter", f"train it again with: {command}"
        if not folder.is_dir():
            raise KestrelError(f"there is no adapter in {folder}; train it with: {command}")
        manifest = read_adapter(folder, expected, remedy, remedy)
        check_weights(folder, adapter_config(folder))
        if settings.training.init_adapter is None:  # else the shape is that adapter's
            recorded = _compared(manifest["settings"].get("lora"))
            require_equal(f"the adapter in {folder}", {"lora": recorded}, {"lora": ours}, remedy)
        _name_other_training(settings, manifest, command)
        return folder, manifest
    folder = find_adapter(name)
    if is_made_by_kestrel(folder):
        manifest = read_adapter(folder, expected, _FIT, repair_advice(folder))
        if manifest["made_from"].get("base", {}).keys().isdisjoint(base):
            named = manifest.get("base_model")
            _check_base_name(settings, folder, named.get("name") if isinstance(named, dict) else None)
    else:
        manifest = _read_foreign(folder)
        _check_base_name(settings, folder, manifest["made_from"]["base"])
    check_weights(folder, adapter_config(folder))
    for line in differences({"lora": _compared(manifest["settings"].get("lora"))}, {"lora": ours}):
        print(f"note: {name}: {line}; the adapter's own value is used", file=sys.stderr)
    return folder, manifest


def _name_other_training(settings: Settings, manifest: dict[str, Any], command: str) -> None:
    """Says which settings of the training are not those that the run's adapter was trained with."""
    now = settings.training.model_dump(include=DECISIVE_TRAINING_SETTINGS)
    recorded = manifest["settings"].get("training")
    then = {key: recorded.get(key, value) for key, value in now.items()} if isinstance(recorded, dict) else now
    for line in differences({"training": then}, {"training": now}, "this run was trained with {}, not {}"):
        print(f"note: {line}; to train it again: {command} --training.resume never", file=sys.stderr)


def read_adapter(folder: Path, expected: dict[str, Any], if_other: str, if_damaged: str) -> dict[str, Any]:
    """The manifest of one of Kestrel's adapters, if it is whole and was trained on this base with this prompt.

    A base known by its files and a base known by its name on the Hub cannot be compared here; `prove_loaded` then tells
    them apart.

    Args:
        expected: this run's prompt identity, quantization, and base.
        if_other, if_damaged: what to do about an adapter with other settings, or a damaged one, for messages.

    Raises:
        KestrelError: damaged, or of another base or prompt; naming what differs.
    """
    manifest = read_manifest(folder, "adapter", if_damaged)
    nll = manifest.get("canary_nll")
    if not isinstance(nll, int | float) or not math.isfinite(nll):
        raise KestrelError(f"{folder / MANIFEST} is damaged (no canary_nll); {if_damaged}")
    recorded = {
        "prompt": read_json(folder / PROMPT, if_damaged),
        "quantization": manifest["settings"].get("quantization"),
        "base": manifest["made_from"].get("base"),
    }
    if isinstance(recorded["base"], dict) and recorded["base"].keys().isdisjoint(expected["base"]):
        recorded["base"] = expected["base"]
    require_equal(f"the adapter in {folder}", recorded, expected, if_other)
    return manifest


def _read_foreign(folder: Path) -> dict[str, Any]:
    """A manifest of what is known of an adapter that Kestrel did not make."""
    if (folder / PROMPT).exists():
        raise KestrelError(f"{folder} holds a Kestrel adapter without its {MANIFEST}; {repair_advice(folder)}")
    adapter_config(folder)
    require_files(str(folder), {path.name for path in folder.iterdir() if path.is_file()})
    return foreign_manifest(folder)


def _check_base_name(settings: Settings, folder: Path, recorded: Any) -> None:
    """Refuses an adapter whose base has another name on the Hub than this run's."""
    ours = settings.hub.base_model or settings.model.name
    if not isinstance(recorded, str) or not is_hub_id(recorded):
        note = f"note: {folder} does not name its base on the Hub (found {recorded!r}); only shapes can be checked"
        print(note, file=sys.stderr)
        return
    if ours == recorded:
        return
    what = f"the adapter in {folder} was trained on {recorded}, and this run's base is {ours}"
    if Path(ours).is_dir():
        raise KestrelError(f"{what}; if that is a copy of {recorded}, add --hub.base_model {recorded}")
    raise KestrelError(f"{what}; use the adapter's base: --model.name {recorded}")


def _compared(lora: Any) -> Any:
    """Settings of LoRA that matter in inference: without dropout, and with the layers in alphabetical order."""
    if not isinstance(lora, dict):
        return lora
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in lora.items()}
    return {key: value for key, value in ordered.items() if key != "dropout"}
