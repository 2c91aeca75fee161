"""The adapter that the settings name: the run's own, one in a folder, or one on the Hub, ours or made elsewhere.

Ours record their prompt, their base and a likelihood, and are held to them. Of others, only the base's name and the
shapes of the weights can be checked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kestrel.adapter.lora import adapter_config
from kestrel.adapter.proof import read_adapter
from kestrel.adapter.source import PROMPT, WEIGHTS, described, find_folder, is_ours, restore
from kestrel.config.settings import Settings, is_hub_id
from kestrel.errors import KestrelError
from kestrel.runtime.manifest import MANIFEST, differences, require_equal

_FIT = (
    "set the run's settings to the adapter's (of the base: model.name, and model.revision to its commit; of the prompt: "
    "prompt.format, then run preprocess.py again)"
)


def open_adapter(
    settings: Settings, identity: dict[str, Any], base: dict[str, Any], command: str
) -> tuple[Path, dict[str, Any]]:
    """Finds the adapter and checks, before anything large is loaded, what can be known about it.

    Args:
        settings: of this run.
        identity: of the prompt as this run renders.
        base: this run's `model.base_identity`.
        command: the command that trains an adapter, for messages.

    Returns:
        Its folder and its manifest; for an adapter made elsewhere, a manifest of what is known, of another kind.

    Raises:
        KestrelError: missing, damaged, or of another base, prompt or rank; naming what differs.
    """
    quantization, name = settings.quantization.model_dump(), settings.model.adapter
    lora = settings.lora.model_dump()
    if name is None:
        folder = Path(settings.run_dir) / "adapter"
        manifest = read_adapter(folder, identity, quantization, base, command)
        recorded = {"lora": manifest["settings"].get("lora")}
        require_equal(f"the adapter in {folder}", recorded, {"lora": lora}, f"train it anew with: {command}")
        return folder, manifest
    folder = find_folder(name)
    if is_ours(folder):
        manifest = read_adapter(folder, identity, quantization, base, command, (_FIT, restore(folder)))
        named = manifest.get("base_model")
        theirs = named.get("name") if isinstance(named, dict) else None
        if manifest["made_from"].get("base", {}).keys().isdisjoint(base):
            _check_base(settings, folder, theirs)
    else:
        manifest = _describe(folder, settings)
    _tell_differences(name, manifest["settings"].get("lora"), lora)
    return folder, manifest


def _describe(folder: Path, settings: Settings) -> dict[str, Any]:
    """What is known of an adapter that has no manifest, as far as it can be used here."""
    if (folder / PROMPT).exists():
        raise KestrelError(f"{folder} holds an adapter of Kestrel without its {MANIFEST}; {restore(folder)}")
    adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise KestrelError(f"there is no {WEIGHTS} in {folder}; other forms of weights are not read")
    manifest = described(folder)
    _check_base(settings, folder, manifest["made_from"]["base"])
    return manifest


def _check_base(settings: Settings, folder: Path, recorded: Any) -> None:
    """Refuses an adapter whose base has another name on the Hub than this run's."""
    if not isinstance(recorded, str) or not is_hub_id(recorded):
        said = f"{folder} does not say of which base on the Hub it is ({recorded!r}); only shapes can be checked"
        print(f"note: {said}", file=sys.stderr)
        return
    ours = settings.hub.base_model or settings.model.name
    if ours == recorded:
        return
    where = f"the adapter in {folder} was trained on {recorded}, and the base of this run is {ours}"
    if Path(ours).is_dir():
        raise KestrelError(f"{where}; if that is a copy of it, say so: --hub.base_model {recorded}")
    raise KestrelError(f"{where}; an adapter belongs to its base: --model.name {recorded}")


def _tell_differences(name: str, recorded: Any, lora: dict[str, Any]) -> None:
    """Names where lora.* of the settings is not what the adapter has; the adapter's own counts."""
    theirs, ours = ({"lora": _comparable(value)} for value in (recorded, lora))
    for line in differences(theirs, ours):
        print(f"note: {name}: {line}; the adapter's own counts", file=sys.stderr)


def _comparable(lora: Any) -> Any:
    """Without the dropout, which has no part in inference, and without an order of the layers."""
    if not isinstance(lora, dict):
        return lora
    targets = lora.get("target_modules")
    ordered = sorted(targets) if isinstance(targets, list) else targets
    return {**{key: value for key, value in lora.items() if key != "dropout"}, "target_modules": ordered}
