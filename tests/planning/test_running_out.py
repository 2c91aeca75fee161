"""Where memory runs out, passes become smaller, and the result stays the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_models import make_model
from safetensors.torch import load_file
from scripts import die_after
from test_passes import refuse, settings_for
from torch.utils._python_dispatch import TorchDispatchMode

import train
from kestrel.adapter.lora import add_lora
from kestrel.adapter.source import WEIGHTS
from kestrel.config.resolve import resolve
from kestrel.config.settings import Lora
from kestrel.data.dataset import lengths_of, load_split
from kestrel.errors import KestrelError
from kestrel.model.host_embedding import move_embedding_to_host
from kestrel.model.loss import attach_token_nll, token_nll
from kestrel.planning import passes
from kestrel.planning.passes import Plan
from kestrel.training import arguments, fit
from kestrel.training.trainer import DialogueTrainer


def exhaust(monkeypatch: pytest.MonkeyPatch, tokens: int, of_rows: int = 1) -> list[int]:
    """Makes passes of more tokens than this fail in training, after their backward pass. Returns their sizes."""
    failed: list[int] = []

    def nll(model, batch):
        value = token_nll(model, batch)
        rows = len(batch["input_ids"])
        if model.training and batch["input_ids"].numel() > tokens and rows >= of_rows:
            failed.append(batch["input_ids"].numel())
            value.sum().backward()  # gradients that must not stay
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value

    monkeypatch.setattr("kestrel.training.objective.token_nll", nll)
    return failed


def results(run: Path) -> tuple[bytes, bytes]:
    return (run / "adapter" / WEIGHTS).read_bytes(), (run / "logs" / "training.jsonl").read_bytes()


def chosen_in(checkpoint: Path) -> int:
    """The tokens per pass that a checkpoint records."""
    return json.loads((checkpoint / "passes.json").read_text())["chosen"]["tokens_per_step"]


def test_a_step_that_does_not_fit_is_done_again_in_smaller_passes(prepared, tmp_path, monkeypatch, capsys):
    """To the bit what smaller passes give from the beginning, with dropout: nothing is left of the failed attempt."""
    one_step = ["--training.max_steps", "1", "--training.evaluations", "1"]
    with monkeypatch.context() as patch:
        failed = exhaust(patch, 100, of_rows=2)
        assert train.main([*prepared.copy_to(tmp_path / "run"), *one_step]) == 0
    printed = capsys.readouterr().out
    assert failed and printed.count("out of memory in a pass of") == len(failed)
    budget = chosen_in(tmp_path / "run/checkpoints/checkpoint-1")
    assert f"passes hold at most {budget:,} (training.tokens_per_step)" in printed
    small = [*prepared.copy_to(tmp_path / "small"), *one_step, "--training.tokens_per_step", str(budget)]
    assert train.main(small) == 0
    assert results(tmp_path / "run") == results(tmp_path / "small")


def test_smaller_passes_lead_to_the_same_adapter(prepared, tmp_path, monkeypatch):
    """Without dropout, whose draws depend on the shapes they fill."""
    weights = []
    for name, tokens in (("enough", 10_000), ("little", 260)):
        with monkeypatch.context() as patch:
            exhaust(patch, tokens, of_rows=2)
            assert train.main([*prepared.copy_to(tmp_path / name), "--lora.dropout", "0.0"]) == 0
        weights.append(load_file(str(tmp_path / name / "adapter" / WEIGHTS)))
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-3), name


def test_after_stepping_down_an_interrupted_run_ends_where_a_whole_one_does(prepared, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        exhaust(patch, 260, of_rows=2)
        assert train.main(prepared.copy_to(tmp_path / "whole")) == 0
        with monkeypatch.context() as death:
            arguments = prepared.copy_to(tmp_path / "run")
            die_after(death, 7)
            assert train.main(arguments) == 1
        capsys.readouterr()
        assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "resuming from" in printed and "out of memory" not in printed
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    # The plan of other settings is not taken.
    checkpoint, other = tmp_path / "run/checkpoints/checkpoint-8", settings_for(tokens_per_step=999)
    monkeypatch.setattr(passes, "Estimator", refuse)
    assert passes.plan_passes(other, None, None, checkpoint).tokens_per_step == 999  # type: ignore[arg-type]


def test_an_embedding_on_the_host_changes_nothing_but_its_place(prepared, trained, tmp_path, monkeypatch):
    settings, _ = resolve(str(prepared.config), {}, [])
    checkpoints = trained.run / "checkpoints"
    whole = passes.read_passes(
        max(checkpoints.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime), settings
    )
    assert whole is not None and not whole.embedding_on_host
    moved: list[Any] = []
    monkeypatch.setattr(passes, "plan_passes", lambda *_: replace(whole, embedding_on_host=True))
    monkeypatch.setattr(fit, "move_embedding_to_host", lambda base: (moved.append(base), move_embedding_to_host(base)))
    assert train.main([*prepared.copy_to(tmp_path / "run")]) == 0
    assert len(moved) == 1 and not hasattr(moved[0].get_input_embeddings(), "weight")
    assert results(tmp_path / "run") == results(trained.run)
    newest = max((tmp_path / "run/checkpoints").glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    assert passes.read_passes(newest, settings) == replace(whole, embedding_on_host=True)


def test_one_dialogue_that_does_not_fit_ends_the_run_with_what_to_change(prepared, tmp_path, monkeypatch, capsys):
    exhaust(monkeypatch, 60)
    large = ["--quantization.bits", "16", "--lora.target_modules", "all-linear"]
    assert train.main([*prepared.copy_to(tmp_path / "run"), *large]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    places = [error.index(key) for key in ("quantization.bits: 4", "recompute: full", "max_length", "target_modules")]
    assert "out of memory in a pass of 1 x " in error and places == sorted(places)
    assert not (tmp_path / "run" / "adapter").exists()


def trainer_for(prepared: Any, budget: int) -> DialogueTrainer:
    settings, _ = resolve(str(prepared.config), {"training.report_to": []}, [])
    rows = load_split(prepared.run / "dataset", "train", "")
    model = add_lora(make_model().requires_grad_(False), Lora(r=4, dropout=0.1), seed=0)
    attach_token_nll(model)
    return DialogueTrainer(
        settings, np.array_split(np.arange(len(rows)), 3), {}, Plan(budget, "none"),
        model=model, train_dataset=rows, eval_dataset=rows,
        processing_class=type("Tokenizer", (), {"eos_token_id": 11, "save_pretrained": None})(),
        args=arguments.arguments_for(settings, 3, prepared.run.parent / "unused", on_gpu=False),
    )  # fmt: skip


def test_trying_the_largest_pass_finds_the_size_that_fits_and_leaves_no_trace(prepared, monkeypatch, capsys):
    trainer = trainer_for(prepared, 4096)
    failed = exhaust(monkeypatch, 300, of_rows=2)
    before = torch.get_rng_state()
    trainer.try_largest_pass()
    lengths = lengths_of(trainer.train_dataset)
    heaviest = max(len(step) * lengths[step].max() for step in trainer._steps)
    assert failed[0] == heaviest and len(failed) == capsys.readouterr().out.count("out of memory")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in trainer.model.parameters())
    failures = len(failed)
    for step in range(3):
        inputs = trainer.inputs_of(trainer.rows_of_step(step))
        assert all(len(b["input_ids"]) == 1 or b["input_ids"].numel() <= 300 for b in inputs["forward_passes"])
        trainer.training_step(trainer.model, inputs)
    assert len(failed) == failures


def test_with_a_sharded_base_no_pass_is_made_again(prepared, monkeypatch):
    """The others take part in each pass, and would wait for one that is made again."""
    trainer = trainer_for(prepared, 4096)
    trainer._sharded = True
    exhaust(monkeypatch, 100, of_rows=2)
    with pytest.raises(KestrelError, match=r"in a pass of \d+ x \d+ tokens; .* lower training.tokens_per_"):
        trainer.training_step(trainer.model, trainer.inputs_of(trainer.rows_of_step(0)))


class _Waits(TorchDispatchMode):
    """Finds operations that wait for a GPU: their results are numbers or sizes on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexed_by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        if name in waiting or indexed_by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_gpu(prepared):
    trainer = trainer_for(prepared, 200)
    inputs = trainer.inputs_of(trainer.rows_of_step(0))
    assert len(inputs["forward_passes"]) > 2
    with _Waits() as waits:
        trainer.training_step(trainer.model, inputs)
        trainer._clip_grad_norm(trainer.model)
    assert waits.found == []
    with _Waits() as waits:  # does find one
        bool(torch.isfinite(trainer.last_gradient_norm))
    assert waits.found == ["_local_scalar_dense"]


def test_auto_takes_what_fits_the_named_memory(prepared, tmp_path, capsys):
    """Through train.py, on a CPU in place of the GPU."""
    arguments = [*prepared.copy_to(tmp_path / "run"), "--training.device_memory", "720MiB", "--training.max_steps", "2"]
    assert train.main(arguments) == 0
    plan = r"passes of up to ([\d,]+) tokens, recompute none: about 0.7 of 0.7 GiB"
    found = re.search(plan, capsys.readouterr().out)
    assert found is not None
    assert f"{chosen_in(tmp_path / 'run/checkpoints/checkpoint-2'):,}" == found[1]
    assert train.main([*arguments, "--training.device_memory", "600MiB"]) == 0
    assert re.search(r"warning: training needs about 0.\d GiB and has 0.6;", capsys.readouterr().err)
