"""Passes: what fits is chosen, what does not fit is made smaller, and the result stays the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from make_models import make_model, settings_of
from safetensors.torch import load_file
from scripts import die_after
from torch.utils._python_dispatch import TorchDispatchMode

import train
from kestrel.adapter.lora import add_lora
from kestrel.adapter.source import WEIGHTS
from kestrel.config.resolve import resolve
from kestrel.config.settings import Lora, Settings, Training
from kestrel.data.dataset import lengths_of, load_split, supervised_of
from kestrel.errors import KestrelError
from kestrel.model.host_embedding import move_embedding_to_host
from kestrel.model.loss import attach_token_nll, token_nll
from kestrel.planning import passes
from kestrel.planning.memory import CONTEXT, CannotEstimate, Estimate, Pass
from kestrel.planning.passes import Dialogues, Plan, best_plan
from kestrel.training import arguments, fit
from kestrel.training.trainer import DialogueTrainer

# -- choosing ----------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(20, 400), min_size=4, max_size=60).map(np.asarray)


def settings_for(**training: Any) -> Settings:
    return settings_of(training=Training(**training))


class Arithmetic:
    """An estimator of a fixed number of bytes per token, by level, and a bend where the logits' chunk is full."""

    levels, on_cpu, saturating = ("none", "mlp", "full"), False, 6000

    def __init__(self, embedding: int = 0, busy: int = 0):
        self.embedding, self.busy = embedding, busy

    def estimate(self, shape: Pass, level: str, on_host: bool = False) -> Estimate:
        kept = shape.tokens * {"none": 2_000_000, "mlp": 900_000, "full": 300_000}[level]
        base = 4 * 2**30 - on_host * self.embedding
        return Estimate(base, 0, 0, kept, min(shape.supervised, 512) * 600_000)


def dialogues_of(lengths: np.ndarray, batch_size: int) -> Dialogues:
    steps = np.array_split(np.arange(len(lengths)), -(-len(lengths) // batch_size))
    return Dialogues(lengths, lengths // 3, steps)


@hypothesis_settings(deadline=None)
@given(LENGTHS, st.integers(1, 32), st.integers(4, 60), st.sampled_from([0, 2**30]), st.sampled_from([0, 2000]))
def test_the_fastest_passes_that_fit_are_chosen(lengths, batch_size, gib, embedding, busy):
    dialogues, estimator, memory = dialogues_of(lengths, batch_size), Arithmetic(embedding, busy), gib * 2**30
    chosen = best_plan(settings_for(), estimator, memory, dialogues)
    useful = max(dialogues.longest, min(dialogues.most_tokens, estimator.saturating))

    def most_that_fits(level: str, on_host: bool) -> int | None:
        sizes = [dialogues.longest, *range(dialogues.longest, useful, 64), useful]
        fitting = (n for n in sizes if estimator.estimate(dialogues.filled(n), level, on_host).needed <= memory)
        return max(fitting, default=None)

    ways = [(level, on_host) for level in estimator.levels for on_host in {False, bool(embedding)}]
    sizes = {way: size for way in ways if (size := most_that_fits(*way))}
    assert chosen.fits == bool(sizes)
    if not chosen.fits:
        way = (dialogues.longest, "full", bool(embedding))
        assert (chosen.tokens_per_step, chosen.recompute, chosen.embedding_on_host) == way
        return
    assert dialogues.longest <= chosen.tokens_per_step <= useful
    assert chosen.tokens_per_step * 1.1 + 128 >= sizes[chosen.recompute, chosen.embedding_on_host]
    least = min(passes.work_of(Plan(size, *way), dialogues, busy) for way, size in sizes.items())
    assert passes.work_of(chosen, dialogues, busy) <= 1.1 * least + 2 * (busy + passes._WORK_OF_A_PASS)


def test_on_a_fast_card_larger_passes_are_worth_recomputation():
    dialogues = dialogues_of(np.full(256, 300), 32)

    def chosen(gib: int, busy: int) -> tuple[str, bool]:
        plan = best_plan(settings_for(), Arithmetic(2**30, busy), gib * 2**30, dialogues)
        return plan.recompute, plan.embedding_on_host

    assert [chosen(gib, busy=0) for gib in (40, 10, 5)] == [("none", False), ("none", False), ("full", True)]
    assert [chosen(gib, busy=4000) for gib in (40, 10, 5)] == [("none", False), ("mlp", False), ("full", True)]


@pytest.mark.parametrize(("gib", "expected"), [(40, "dense"), (25, "none")])
def test_weights_stay_dense_only_where_much_memory_is_left(gib, expected):
    class Denser(Arithmetic):
        levels = ("dense", *Arithmetic.levels)

        def estimate(self, shape: Pass, level: str, on_host: bool = False) -> Estimate:
            dense = level == "dense"
            estimate = super().estimate(shape, "none" if dense else level, on_host)
            return replace(estimate, kept=estimate.kept + dense * 6 * 2**30)

    dialogues, estimator = dialogues_of(np.full(256, 150), 32), Denser()
    plan = best_plan(settings_for(), estimator, gib * 2**30, dialogues)
    assert plan.recompute == expected and plan.fits
    set_to = best_plan(settings_for(recompute="dense"), estimator, gib * 2**30, dialogues)
    assert set_to.recompute == "dense" and set_to.fits
    estimator.on_cpu = True
    assert best_plan(settings_for(), estimator, gib * 2**30, dialogues).recompute == "none"


def test_a_sharded_base_keeps_no_dense_weights(tmp_path, monkeypatch):
    """Neither if asked to, nor because the run began without sharding."""
    monkeypatch.setattr(passes, "Estimator", refuse)
    passes.write_passes(tmp_path, settings_for(), Plan(100, "dense"))
    found = [passes.plan_passes(settings_for(), None, None, tmp_path, sharded).recompute for sharded in (False, True)]  # type: ignore[arg-type]
    assert found == ["dense", "none"]
    with pytest.raises(KestrelError, match="training.recompute: dense keeps all weights"):
        passes.plan_passes(settings_for(recompute="dense"), None, None, sharded=True)  # type: ignore[arg-type]


def test_given_values_are_kept():
    def chosen_for(**training: Any) -> Plan:
        return best_plan(settings_for(**training), Arithmetic(), 8 * 2**30, dialogues_of(np.full(32, 300), 32))

    chosen = chosen_for(tokens_per_step=3000)
    assert (chosen.tokens_per_step, chosen.recompute, chosen.fits) == (3000, "mlp", True)
    chosen = chosen_for(recompute="none")
    assert chosen.recompute == "none" and 300 <= chosen.tokens_per_step < 2048
    chosen = chosen_for(recompute="none", tokens_per_step=9000)
    assert (chosen.tokens_per_step, chosen.recompute, chosen.fits) == (9000, "none", False)


def refuse(*_: Any) -> None:
    raise CannotEstimate("the memory of a mamba cannot be estimated")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, ""),  # no GPU
        ({"device_memory": "24GiB"}, "warning: the memory of a mamba cannot be estimated"),
        ({"dense_weights": True}, "training.dense_weights has no effect any more"),  # of older configs
    ],
)
def test_without_an_estimate_numbers_are_fixed(training, message, monkeypatch, capsys):
    monkeypatch.setattr(passes, "Estimator", refuse)
    chosen = passes.plan_passes(settings_for(**training), None, None)  # type: ignore[arg-type]  neither is looked at
    assert (chosen.tokens_per_step, chosen.recompute) == (4096, "none")
    assert message in capsys.readouterr().err


def test_the_named_or_free_memory_of_a_gpu_is_taken(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * gib, 24 * gib))
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    unnamed, small, large = settings_for(), settings_for(device_memory="12GiB"), settings_for(device_memory="80 GB")
    assert passes.available_memory(unnamed) == passes.available_memory(large) == 20 * gib + CONTEXT
    assert passes.available_memory(small) == 12 * gib
    assert passes.available_memory(large, is_planned=True) == 80 * 10**9
    passes.limit_gpu_memory(unnamed)
    passes.limit_gpu_memory(small)
    assert limits == [pytest.approx((12 * gib - CONTEXT) / (24 * gib))]


def test_supervised_tokens_are_the_labels(prepared):
    rows = load_split(prepared.run / "dataset", "train", "")
    labels = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert supervised_of(rows).tolist() == labels
    assert supervised_of(rows.select([5, 2, 2])).tolist() == [labels[5], labels[2], labels[2]]


@hypothesis_settings(deadline=None)
@given(LENGTHS, st.integers(1, 32), st.integers(100, 4000))
def test_passes_hold_every_dialogue_within_the_budget(lengths, batch_size, budget):
    dialogues = dialogues_of(lengths, batch_size)
    made = dialogues.passes(budget)
    assert sum(one.rows for one in made) == len(lengths)
    assert sum(one.supervised for one in made) == (lengths // 3).sum()
    largest = dialogues.largest(budget)
    assert all(one.rows == 1 or one.tokens <= budget for one in made)
    assert all(one.tokens <= largest.tokens and one.supervised <= largest.supervised for one in made)


# -- where memory runs out ---------------------------------------------------------------------------------------------


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
