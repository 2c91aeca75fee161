"""The files of a local base, looked at before the library builds anything for them."""

from __future__ import annotations

from pathlib import Path

from kestrel.errors import KestrelError


def require_weights(name: str, parameters: int) -> None:
    """Refuses a local folder whose weights cannot be those of its configuration, or are in a form that is not read.

    Args:
        parameters: that config.json describes.

    Raises:
        KestrelError: naming the file, and the way out.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise KestrelError(f"model.name {name} holds no weights in safetensors{_found_instead(folder)}")
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise KestrelError(
            f"model.name {name} holds parts of a model, such as {paths[0].name}, and no model.safetensors.index.json; copy "
            "the whole folder"
        )
    size = sum(path.stat().st_size for path in paths)
    if parameters > 8 * size:
        raise KestrelError(
            f"model.name {name}: config.json describes {parameters:,} parameters, and the weights are {size:,} bytes"
        )
    for path in paths:
        _require_values(path)


def _found_instead(folder: Path) -> str:
    if found := sorted(folder.glob("*.gguf")):
        return f", but {found[0].name}, a form for inference; name the model that it was made from"
    if found := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        return (
            f", but {found[0].name}, a pickle, which can run anybody's code; if you trust it, load it with transformers and "
            "save it again with save_pretrained"
        )
    return "; copy the whole folder"


def _require_values(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            empty = [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]  # noqa: SIM118
    except SafetensorError as error:
        raise KestrelError(f"{path} is damaged or cut off ({error}); copy or download it again") from None
    if empty:
        raise KestrelError(
            f"{path}: {empty[0]} is empty, as when one process of several (DeepSpeed's ZeRO-3, FSDP) saves its part alone; "
            "gather the weights and save the model again"
        )
