"""Adapters, configurations and templates from anybody: refused in one sentence, within seconds, before memory is taken."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from experiment import Experiment
from given_adapters import NAMED, arguments, as_peft_saves, change
from safetensors.torch import load_file, save_file

import generate
import preprocess
from kestrel.prompt import limits
from kestrel.runtime.atomic import write_json

Spoil = Callable[[Path], object]


def weights_of(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def not_finite(folder: Path) -> None:
    tensors = load_file(weights_of(folder))
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, weights_of(folder))


def every_layer_and_a_rank_of(rank: int) -> Spoil:
    """What one tensor in the file supports, and the layers that have none would take gigabytes."""

    def spoil(folder: Path) -> None:
        change(folder, r=rank, target_modules="all-linear")
        save_file({min(load_file(weights_of(folder))): torch.zeros(rank, 64)}, weights_of(folder))

    return spoil


def written_twice(folder: Path) -> None:
    content = weights_of(folder).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entries = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in header.items()]
    text = ("{" + ",".join([*entries, entries[-1]]) + "}").encode()
    weights_of(folder).write_bytes(struct.pack("<Q", len(text)) + text + data)


def in_float8(folder: Path) -> None:
    tensors = load_file(weights_of(folder))
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, weights_of(folder))


def a_pipe(folder: Path) -> None:
    weights_of(folder).unlink()
    os.mkfifo(weights_of(folder))


def key_twice(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"r": 1000000,', 1))


SPOILT: dict[str, tuple[Spoil, str]] = {
    "a rank of a million": (lambda folder: change(folder, r=10**6), "r: Input should be less than or equal to 65536"),
    "a rank without weights": (lambda folder: change(folder, r=60_000), "does not fit rank 60000 of adapter_config.json"),
    "layers without weights": (every_layer_and_a_rank_of(60_000), "is for other layers than this base has"),
    "not finite": (not_finite, "holds values that are not finite"),
    "a tensor twice": (written_twice, "is given twice"),
    "a key twice": (key_twice, "adapter_config.json is damaged ('r' is given twice)"),
    "a type that no adapter has": (in_float8, "is of type F8_E4M3; an adapter's are"),
    "a pattern without end": (
        lambda folder: change(folder, target_modules="^(([a-z._0-9])+.)+[A-Z]([a-z])+$"),
        "a pattern in",
    ),
    "a pattern of ranks": (lambda folder: change(folder, rank_pattern={"h": 10**6}), "rank_pattern: Input should be less"),
    "a crowd of names": (lambda folder: change(folder, target_modules=["m"] * 10**5), "at most 10000 items"),
    "many tensors": (lambda folder: weights_of(folder).write_bytes(struct.pack("<Q", 10**8)), "a header of 100,000,000"),
    "a pipe": (a_pipe, "has no adapter_model.safetensors at its top"),
    "half a file": (lambda folder: weights_of(folder).write_bytes(b"\xff" * 30), "a header of"),
    "a module to import": (lambda folder: change(folder, megatron_config={"a": 1}, megatron_core="os"), "megatron_con"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_an_adapter_that_is_not_what_it_says_is_refused(
    trained: Experiment, tmp_path: Path, capsys, monkeypatch, how: str
) -> None:
    spoil, message = SPOILT[how]
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    elsewhere = as_peft_saves(trained, tmp_path / "elsewhere")
    spoil(elsewhere)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    assert generate.main(arguments(trained, tmp_path / "run", elsewhere, *NAMED)) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 2**19, "KiB"


TEMPLATES = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set n = namespace(a='aaaa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "a long text": "{{ 'a' * 10**8 }}",
    "a file": "{% include '/etc/passwd' %}",
    "python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
}


@pytest.mark.parametrize("how", TEMPLATES)
def test_a_chat_template_that_harms_is_refused(
    prepared: Experiment, tmp_path: Path, capsys, monkeypatch, how: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in prepared.base.iterdir():
        (base / path.name).symlink_to(path)
    (base / "chat_template.jinja").write_text(TEMPLATES[how])
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    given = prepared.arguments("--run_dir", str(tmp_path / "run"), "--model.name", str(base), "--prompt.format", "chat")
    used, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert preprocess.main(given) == 1
    assert "the chat template" in capsys.readouterr().err
    assert time.monotonic() - began < 30, "twice the limit, and what a busy machine adds"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 2**19, "KiB"


def test_a_model_with_more_layers_than_its_weights_hold_is_refused(
    prepared: Experiment, tmp_path: Path, capsys
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    for path in prepared.base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    given = prepared.arguments("--run_dir", str(run), "--model.name", str(base))
    assert preprocess.main(given) == 0
    for absurd in ({"num_hidden_layers": 10**6}, {"hidden_size": 2**18, "num_attention_heads": 2**12}):
        write_json(base / "config.json", {**config, **absurd})
        began = time.process_time()
        assert generate.main([*given, "--generation.systems", "base"]) == 1
        assert "config.json" in capsys.readouterr().err and time.process_time() - began < 20
