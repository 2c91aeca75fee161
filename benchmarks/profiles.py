"""What benchmarks/train.py measures, and the folder it measures in: a model of random weights and dialogues of a text.

WORK/model       Falcon's architecture, random weights, a tokenizer trained on the text
WORK/dialogues   train, validation and test in Kestrel's own form
WORK/rows        what preprocess.py makes of them: the rows that every system trains on
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kestrel.dialogue import Dialogue

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 512  # tokens of a training sequence, for every system
LEARNING_RATE = 2e-4
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["query_key_value"]}  # Falcon's
_HELD_OUT = 4  # dialogues of validation and of test; the scripts need some, and they are no part of what is timed

Kind = Literal["kestrel", "trl-turns", "trl-dialogues", "trl-packed", "original", "unsloth"]


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name: for `--only`.
        kind: whose training loop, on rows of which form.
        batch_size: rows of a pass: dialogues, or turns where a row is a turn; None: as the config says.
        warmup: optimizer steps before the clock starts.
        steps: optimizer steps that are timed.
        options: of train.py, for Kestrel; of the peer's arguments, for a peer.
        config: of Kestrel.
        passes: of an optimizer step, for a peer; Kestrel cuts its steps itself.
    """

    name: str
    kind: Kind
    batch_size: int | None
    warmup: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    config: str = "configs/falcon-7b.yaml"
    passes: int = 1


@dataclass(frozen=True)
class Profile:
    """One machine's table.

    Attributes:
        shape: what of the model differs from Falcon-7B.
        layers: decoder layers; None: the shape's.
        vocabulary: of the tokenizer.
        repeat: how often the text's dialogues stand in the training set, so that an epoch is long enough to time.
        checked: dialogues whose losses must agree before anything is timed.
        model: a name of shapes.py, whose linear layers all get LoRA; None: Falcon, whose query_key_value gets it.
    """

    shape: dict[str, int]
    layers: int | None
    vocabulary: int
    repeat: int
    checked: int
    systems: tuple[System, ...]
    model: str | None = None

    @property
    def lora(self) -> dict[str, Any]:
        """What peft is told."""
        return {**LORA, "target_modules": "all-linear"} if self.model else LORA


_CHECKPOINTING = {"gradient_checkpointing": True}
_IN_ORDINARY_MEMORY = {  # of which there is enough, so that nothing is made twice to save some; nor do the peers
    "training.batch_size": 8,
    "training.tokens_per_step": 4096,
    "training.recompute": "none",
}
_GROUPED = {"train_sampling_strategy": "group_by_length"}
PROFILES = {
    "cpu": Profile(
        shape={"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 4096},
        layers=6,
        vocabulary=4096,
        repeat=1,
        checked=4,
        systems=(
            System("kestrel", "kestrel", 8, 3, 50, _IN_ORDINARY_MEMORY),
            System("trl-turns", "trl-turns", 8, 3, 40),
            System("trl-dialogues", "trl-dialogues", 8, 3, 25),
            System("trl-dialogues-grouped", "trl-dialogues", 8, 3, 25, _GROUPED),
            System("trl-packed", "trl-packed", 8, 3, 25),
            System("original", "original", 8, 2, 10),
        ),
    ),
    "gpu": Profile(
        shape={},
        layers=32,
        vocabulary=8192,
        repeat=5,
        checked=4,
        systems=(
            System("kestrel-max-throughput", "kestrel", None, 4, 40, config="configs/falcon-7b-max-throughput.yaml"),
            System("kestrel", "kestrel", None, 4, 20),
            System("trl-dialogues", "trl-dialogues", 32, 2, 20),
            System("original", "original", 8, 2, 8),
            System("trl-turns", "trl-turns", 32, 2, 6),
            System("kestrel-8gb-card", "kestrel", None, 2, 8, config="configs/falcon-7b-8gb-card.yaml"),
            System("trl-dialogues-checkpointing", "trl-dialogues", 32, 2, 6, _CHECKPOINTING),
            System("trl-turns-checkpointing", "trl-turns", 32, 2, 6, _CHECKPOINTING),
            System("original-checkpointing", "original", 8, 2, 8, _CHECKPOINTING),
            System("trl-packed", "trl-packed", 32, 2, 6),
        ),
    ),
}


def script(name: str) -> ModuleType:
    """One of the four scripts as a module, by its path: this folder has files of the same names."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_dialogues(text: str) -> list[Dialogue]:
    """The training dialogues of a source in any form that preprocess.py reads."""
    from kestrel.config.settings import Data
    from kestrel.data.corpus import open_corpus
    from kestrel.data.reading import Reading

    return [dialogue for dialogue, *_ in Reading(open_corpus(Data(source=text)), "train").dialogues()]


def _lines(dialogues: list[Dialogue]) -> Iterator[str]:
    """The text as a prompt shows it, so that its frames are tokens as they are for a tokenizer of the wild."""
    for dialogue in dialogues:
        yield "Persona: " + " ".join(dialogue.persona)
        for turn in dialogue.turns:
            yield f"\n{'Partner' if turn.speaker == 'partner' else 'You'}: {turn.text}"


def write_model(folder: Path, profile: Profile, dialogues: list[Dialogue], layers: int | None) -> None:
    """Random weights and a tokenizer of the dialogues' words."""
    from benchmarks.falcon_7b_shape import write_tokenizer, write_weights
    from benchmarks.shapes import write_shape

    layers = layers or profile.layers
    if profile.model:
        print(f"writing random weights of the shape of {profile.model} into {folder}", flush=True)
        write_shape(folder, profile.model, _lines(dialogues), layers)
        return
    assert layers is not None
    print(f"writing a Falcon of random weights into {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, _lines(dialogues), profile.vocabulary)
    write_weights(folder, layers, seed=0, **profile.shape)


def write_dialogues(folder: Path, dialogues: list[Dialogue], repeat: int) -> None:
    """Every dialogue `repeat` times for training, and a few of them as the other splits."""
    folder.mkdir(parents=True, exist_ok=True)

    def line(dialogue: Dialogue, name: str) -> str:
        turns = [{"speaker": turn.speaker, "text": turn.text} for turn in dialogue.turns]
        return json.dumps({"dialogue_id": name, "persona": list(dialogue.persona), "turns": turns}) + "\n"

    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for copy in range(repeat):
            file.writelines(line(dialogue, f"{copy}-{dialogue.dialogue_id}") for dialogue in dialogues)
    for split in ("validation", "test"):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(line(dialogue, f"{split}-{dialogue.dialogue_id}") for dialogue in dialogues[:_HELD_OUT])


def arguments(work: Path, model: Path, system: System, dtype: str) -> list[str]:
    """The command line of preprocess.py and train.py for a row of Kestrel's."""
    options: dict[str, Any] = {
        "run_dir": work / system.name,
        "data.source": work / "dialogues",
        "model.name": model,
        "prompt.max_length": MAX_LENGTH,
        "quantization.compute_dtype": dtype,
        "training.learning_rate": LEARNING_RATE,
        "training.max_steps": system.warmup + system.steps,
        "training.evaluations": 1,
        "training.samples": 0,
        "training.resume": "never",
        **system.options,
    }
    given = [item for key, value in options.items() for item in (f"--{key}", str(value))]
    return ["--config", str(ROOT / system.config), *given, "--training.report_to"]
