"""A run that begins from a trained adapter: training.init_adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kestrel.adapter.open import open_adapter
from kestrel.adapter.source import WEIGHTS, lora_of, read_config
from kestrel.config.settings import Settings, is_hub_id
from kestrel.errors import KestrelError, ProofError
from kestrel.prompt.prompt import Prompt

# Relative difference of the validation loss; another GPU or other passes round otherwise.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Initial:
    """The adapter that a run begins from: its folder and its manifest, as `open_adapter` returns them."""

    name: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return str(self.manifest["files"][WEIGHTS])

    def expected_loss(self, dataset: str) -> float | None:
        """The validation loss that it reached, where it was trained on the same data set; None where that is unknown."""
        same = self.manifest["made_from"].get("dataset") == dataset
        loss = self.manifest.get("eval_loss")
        return float(loss) if same and isinstance(loss, int | float) else None

    def facts(self) -> dict[str, Any]:
        """What the manifest of the resulting adapter says of it; of a local folder, no path."""
        named = is_hub_id(self.name.partition("@")[0]) and not Path(self.name).exists()
        return {"sha256": self.sha256, **({"name": self.name} if named else {})}


def open_initial(settings: Settings, prompt: Prompt, base: dict[str, Any]) -> tuple[Settings, Initial | None]:
    """The adapter to begin from, and the settings with its rank, alpha and layers; None where a fresh one is trained.

    Raises:
        KestrelError: missing, damaged, or trained with another base or prompt; naming what differs.
    """
    name = settings.training.init_adapter
    if name is None:
        return settings, None
    named = settings.model_copy(update={"model": settings.model.model_copy(update={"adapter": name})})
    try:
        folder, manifest = open_adapter(named, prompt, base, "")
    except KestrelError as error:
        raise KestrelError(str(error).replace("model.adapter", "training.init_adapter")) from None
    shape = {key: value for key, value in lora_of(read_config(folder)).items() if key != "dropout"}
    taken = settings.model_copy(update={"lora": settings.lora.model_copy(update=shape)})
    return taken, Initial(name, folder, manifest)


class BeginsWhereItEnded(TrainerCallback):
    """Proves at step 0 that the adapter predicts validation as well as its manifest says."""

    def __init__(self, expected: float, dtype: str):
        self._expected, self._tolerance = expected, _TOLERANCE[dtype]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **extra: Any) -> None:
        if state.global_step == 0 and not abs(metrics["eval_loss"] / self._expected - 1) <= self._tolerance:
            raise ProofError(
                f"the adapter of training.init_adapter has validation loss {metrics['eval_loss']:.4f} here, and reached "
                f"{self._expected:.4f} on the same dialogues where it was trained: base or versions differ"
            )
