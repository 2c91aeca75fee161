"""What benchmarks/train.py measures with --shape: rows of one model of shapes.py, with LoRA on all of its linear layers.

The weights are in NF4 already, so that all systems load the same ones. The peers of the GPU's rows get the dialogues of
Kestrel's optimizer steps in the same order: dialogues of similar length share a step, which no peer does unasked.
"""

from __future__ import annotations

from typing import Any

from benchmarks.profiles import PROFILES, Profile, System

_LEARNING_RATE = 1e-4
CONFIG = "configs/mistral-7b-v0.3.yaml"  # a base model's; the options say what matters here
_SMALL = ("smollm2-135m", "tiny")  # more steps are timed, since each is short, and any card is large enough
_ORDERED = {"learning_rate": _LEARNING_RATE, "train_sampling_strategy": "sequential"}
_CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
_LIGER = {"use_liger_kernel": True}


def profile_of(machine: str, shape: str | None) -> Profile:
    """The table of a machine, cpu or gpu; with a shape, its model instead of the machine's Falcon."""
    if shape is None:
        return PROFILES[machine]
    systems = _rows_of_cpu() if machine == "cpu" else _rows_of_gpu(shape)
    checked = 2 if machine == "cpu" else 4
    return Profile({}, layers=None, vocabulary=0, repeat=1, checked=checked, systems=systems, model=shape)


def _kestrel(name: str, warmup: int, steps: int, **more: Any) -> System:
    """A row of train.py; `more` are keys of the training section."""
    auto = {"tokens_per_step": "auto", "recompute": "auto"}
    training = {**auto, "batch_size": 32, "learning_rate": _LEARNING_RATE, **more}
    options = {"prompt.format": "plain", "lora.target_modules": "all-linear"}
    options |= {f"training.{key}": value for key, value in training.items()}
    return System(name, "kestrel", None, warmup, steps, options, CONFIG)


def _rows_of_cpu() -> tuple[System, ...]:
    """Eight dialogues a step, and few steps: one of SmolLM2-135M takes ten seconds on two cores.

    transformers groups by length only what is many times longer than a run of few steps; so -grouped has Kestrel's steps.
    """
    peer: dict[str, Any] = {"learning_rate": _LEARNING_RATE}
    return (
        _kestrel("kestrel", 1, 6, batch_size=8),
        System("trl-dialogues", "trl-dialogues", 8, 1, 4, peer),
        System("trl-dialogues-grouped", "trl-dialogues", 8, 1, 4, _ORDERED),
        System("trl-turns", "trl-turns", 8, 1, 4, peer),
    )


def _rows_of_gpu(shape: str) -> tuple[System, ...]:
    """32 dialogues a step. Neither unsloth nor Liger has kernels for Falcon."""
    ours, theirs, trl = ((5, 25), (5, 25), (5, 25)) if shape in _SMALL else ((3, 10), (3, 8), (2, 7))
    known = not shape.startswith("falcon")
    rows = [_kestrel("kestrel", *ours, device_memory="80GB")]
    if shape not in _SMALL:
        rows += [_kestrel(f"kestrel-{size}gb", *ours, device_memory=f"{size}GB") for size in (10, 8)]
    if known:
        rows += [
            System("unsloth", "unsloth", 32, *theirs, _ORDERED),
            System("unsloth-checkpointing", "unsloth", 32, *theirs, {**_ORDERED, "gradient_checkpointing": "unsloth"}),
            System("trl-liger", "trl-dialogues", 16, *trl, {**_ORDERED, **_LIGER}, passes=2),
            System("trl-liger-checkpointing", "trl-dialogues", 32, *trl, {**_ORDERED, **_LIGER, **_CHECKPOINTING}),
        ]
    rows += [
        System("trl", "trl-dialogues", 16, *trl, _ORDERED, passes=2),
        System("trl-checkpointing", "trl-dialogues", 32, *trl, {**_ORDERED, **_CHECKPOINTING}),
    ]
    return tuple(rows)
