"""Training does what it says, and stops where it does not."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_models import make_model, write_base
from matplotlib import image
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scripts import worsen

import generate
import preprocess
import train
from kestrel.adapter import proof
from kestrel.adapter.lora import add_lora
from kestrel.adapter.source import WEIGHTS
from kestrel.config.resolve import resolve
from kestrel.config.settings import Lora
from kestrel.data.dataset import load_split
from kestrel.model.loss import attach_token_nll, collate, token_nll
from kestrel.planning.passes import Plan
from kestrel.prompt.load import load_prompt
from kestrel.prompt.prompt import Prompt, Unrenderable
from kestrel.prompt.tokenizer import load_tokenizer
from kestrel.training import arguments, fit
from kestrel.training.samples import Samples
from kestrel.training.trainer import DialogueTrainer


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "training.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "adapter" / WEIGHTS))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_log_has_the_contracts_keys(trained):
    lines = log_of(trained.run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert all(line.keys() == {"step", "loss", "learning_rate", "grad_norm", "tokens"} for line in steps)
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6, 8]
    assert all(line.keys() == {"step", "eval_loss", "eval_perplexity", "tokens"} for line in evaluations)
    for line in evaluations:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(steps))


def test_learning_rate_warms_up_to_its_peak_and_decays(prepared, tmp_path):
    arguments = prepared.copy_to(tmp_path / "run")
    arguments += ["--training.max_steps", "10", "--training.warmup_ratio", "0.3", "--training.evaluations", "1"]
    assert train.main(arguments) == 0
    rates = [line["learning_rate"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert rates[:4] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[4:] == pytest.approx([1e-2 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(1, 7)])


def test_samples_and_plot(trained):
    samples = [json.loads(line) for line in (trained.run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in samples] == [0, 2, 4, 6, 8]
    assert samples[0].keys() == {
        "step", "dialogue_id", "turn", "persona", "history", "reference", "response", "stopped_by",
    }  # fmt: skip
    assert image.imread(trained.run / "logs" / "loss.png").shape[:2] == (750, 1050)


def test_samples_are_greedy_whatever_the_settings_of_generation(trained):
    settings, _ = resolve(str(trained.config), {}, [])
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    rows, model = load_split(trained.run / "dataset", "validation", ""), make_model()
    rows_of = []
    for changes in ({}, {"num_beams": 4, "length_penalty": 0.1}, {"do_sample": True, "temperature": 9.0, "top_k": 50}):
        changed = settings.model_copy(update={"generation": settings.generation.model_copy(update=changes)})
        rows_of.append(Samples(model, prompt, rows, changed, lambda *_: None).rows())
    assert rows_of[0] and rows_of[0] == rows_of[1] == rows_of[2]


def test_a_sample_that_cannot_be_rendered_gives_way_to_the_next_reply(trained, monkeypatch):
    settings, _ = resolve(str(trained.config), {"training.samples": "1"}, [])
    prompt, rows = load_prompt(settings), load_split(trained.run / "dataset", "train", "")
    rows = rows.filter(lambda row: sum(turn["speaker"] == "self" for turn in row["turns"]) > 2)
    own, asked = prompt.context, []

    def context(dialogue, turn):
        asked.append(turn)
        if len(asked) == 1:
            raise Unrenderable("too long", "longer than prompt.max_length")
        return own(dialogue, turn)

    monkeypatch.setattr(prompt, "context", context)
    (sample,) = Samples(make_model(), prompt, rows, settings, lambda *_: None).rows()
    assert sample["turn"] == asked[1] > asked[0]


def test_adapter_moved_and_is_the_best_checkpoint(trained, prepared, tmp_path, monkeypatch):
    """Also where the best one is not the last."""
    worsen(monkeypatch, after=1)
    assert train.main(prepared.copy_to(tmp_path / "run")) == 0
    bests = []
    for run in (trained.run, tmp_path / "run"):
        assert all(tensor.abs().max() > 0 for name, tensor in weights_of(run).items() if "lora_B" in name)
        losses = {line["step"]: line["eval_loss"] for line in log_of(run) if "eval_loss" in line}
        best = min(losses, key=losses.__getitem__)
        kept = load_file(str(run / "checkpoints" / f"checkpoint-{best}" / WEIGHTS))
        assert same(kept, weights_of(run))
        manifest = json.loads((run / "adapter" / "manifest.json").read_text())
        assert (manifest["best_step"], manifest["eval_loss"]) == (best, losses[best])
        bests.append(best == max(losses))
    assert bests == [True, False]


def test_last_steps_are_logged_evaluated_and_saved_too(prepared, tmp_path):
    arguments = [*prepared.copy_to(tmp_path / "run"), "--training.keep_checkpoints", "3"]
    arguments += ["--training.max_steps", "7", "--training.evaluations", "4", "--training.logging_steps", "5"]
    assert train.main(arguments) == 0
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 7]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 7]
    kept = sorted(path.parent.name for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"))
    assert kept == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]


def test_early_stopping(prepared, tmp_path, monkeypatch):
    """Three evaluations get better, and two that do not end the run."""
    worsen(monkeypatch, after=3)
    arguments = prepared.copy_to(tmp_path / "run")
    arguments += ["--training.max_steps", "20", "--training.evaluations", "20", "--training.early_stopping", "2"]
    assert train.main(arguments) == 0
    losses = [line["eval_loss"] for line in log_of(tmp_path / "run") if "eval_loss" in line]
    assert len(losses) == 6 and losses.index(min(losses)) == 3
    first, log = weights_of(tmp_path / "run"), log_of(tmp_path / "run")
    assert train.main(arguments) == 0  # again: it is over, and stays so
    assert same(first, weights_of(tmp_path / "run")) and log == log_of(tmp_path / "run")


def test_16_bit_trains_and_generates(prepared, tmp_path):
    arguments = prepared.copy_to(tmp_path / "run")
    assert train.main([*arguments, "--quantization.bits", "16", "--training.max_steps", "2"]) == 0
    assert generate.main([*arguments, "--quantization.bits", "16", "--generation.max_dialogues", "1"]) == 0
    assert generate.main(arguments) == 1  # an adapter belongs to the base it was trained on


# -- the same trajectory, however it is cut ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [["--training.tokens_per_step", "1"], ["--training.recompute", "full"]])
def test_trajectory_does_not_depend_on_how_a_step_is_computed(prepared, tmp_path, change):
    """Without dropout, whose draws depend on the shapes they fill."""
    weights, losses = [], []
    for name, more in (("plain", []), ("changed", change)):
        arguments = [*prepared.copy_to(tmp_path / name), "--lora.dropout", "0.0", "--training.max_steps", "6", *more]
        assert train.main(arguments) == 0
        weights.append(weights_of(tmp_path / name))
        losses.append([line.get("loss", line.get("eval_loss")) for line in log_of(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-3), name
    if "recompute" in change[0]:
        assert same(*weights)


@pytest.mark.parametrize("architecture", ["falcon", "llama"])
def test_recomputation_gives_identical_gradients_with_dropout(architecture):
    gradients = []
    for recompute in ("dense", "none", "mlp", "full"):
        targets = ["query_key_value"] if architecture == "falcon" else ["q_proj", "v_proj"]
        base = make_model(architecture).requires_grad_(False)
        model = add_lora(base, Lora(r=4, dropout=0.2, target_modules=targets), seed=0)
        attach_token_nll(model, recompute)
        model.train()
        torch.manual_seed(3)
        token_nll(model, collate([{"input_ids": [*range(20, 60)], "labels": [*range(20, 60)]}], 11)).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and all(same(gradients[0], found) for found in gradients[1:])


def test_each_token_of_a_step_weighs_the_same(prepared):
    """The gradient of a step cut into many passes is that of the mean over all of its supervised tokens."""
    settings, _ = resolve(str(prepared.config), {"training.tokens_per_step": "120", "training.report_to": []}, [])
    rows = load_split(prepared.run / "dataset", "train", "")
    model = add_lora(make_model().requires_grad_(False), Lora(r=4, dropout=0.0), seed=0)
    attach_token_nll(model)
    chosen = np.arange(7)
    trainer = DialogueTrainer(
        settings, [chosen], {}, Plan(120, "none"), model=model, train_dataset=rows, eval_dataset=rows,
        processing_class=type("Tokenizer", (), {"eos_token_id": 11, "save_pretrained": None})(),
        args=arguments.arguments_for(settings, 1, prepared.run.parent / "unused", on_gpu=False),
    )  # fmt: skip
    step = next(iter(trainer.get_train_dataloader()))
    assert len(step["forward_passes"]) > 3
    assert sum(int((batch["labels"] != -100).sum()) for batch in step["forward_passes"]) == step["step_weight"]
    loss = trainer.training_step(model, step)
    cut = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    whole = token_nll(model, collate([rows[int(i)] for i in chosen], 11)).mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(cut[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    losses = []
    for budget in (1, 120, 10_000):
        trainer._plan = Plan(budget, "none")
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# -- proofs ------------------------------------------------------------------------------------------------------------


def stopped(capsys, arguments: list[str]) -> str:
    assert train.main(arguments) == 1
    return capsys.readouterr().err


def test_a_first_step_that_learns_nothing_stops_the_run(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kestrel.training.objective.token_nll", lambda model, batch: token_nll(model, batch) * 0)
    said = stopped(capsys, prepared.copy_to(tmp_path / "run"))
    assert "moved no lora_B" in said and not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_step_and_dialogues(prepared, tmp_path, capsys, monkeypatch, value):
    calls = []

    def poisoned(model, batch):
        calls.append(None)  # the first is the evaluation at step 0
        return token_nll(model, batch) * (value if len(calls) == 5 and model.training else 1.0)

    arguments = [*prepared.copy_to(tmp_path / "run"), "--training.evaluations", "1"]
    monkeypatch.setattr("kestrel.training.objective.token_nll", poisoned)
    said = stopped(capsys, arguments)
    assert "the gradient of step 4 is not finite; its dialogues are train-" in said
    assert said.count("train-") == 4
    assert not list((tmp_path / "run" / "checkpoints").glob("*/adapter_model.safetensors"))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_base_with_an_infinite_weight_is_refused(prepared, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(prepared.base, base)
    weights = load_file(str(base / "model.safetensors"))
    weights["transformer.ln_f.weight"][0] = math.inf
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    arguments = [*prepared.copy_to(tmp_path / "run"), "--model.name", str(base)]
    assert preprocess.main(arguments) == 0
    assert "not finite" in stopped(capsys, arguments)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [("values", "was saved with other values"), ("keys", "differ in keys"), ("nothing_learned", "it is the base")],
)
def test_an_adapter_that_is_not_saved_as_trained_stops_the_run(
    prepared, tmp_path, capsys, monkeypatch, break_it, message
):
    own, save_and_prove = PeftModel.save_pretrained, proof.save_and_prove

    def save(self, folder, **extra):
        own(self, folder, **extra)
        if Path(folder).parent.name != "checkpoints":
            assert break_it != "nothing_learned", "it must be refused before it is saved"
            tensors = load_file(f"{folder}/{WEIGHTS}")
            name = min(tensors)
            tensors[name if break_it == "values" else "other"] = tensors.pop(name) * 2
            save_file(tensors, f"{folder}/{WEIGHTS}")

    def forget(model, *more):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return save_and_prove(model, *more)

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    if break_it == "nothing_learned":
        monkeypatch.setattr(fit, "save_and_prove", forget)
    assert message in stopped(capsys, [*prepared.copy_to(tmp_path / "run"), "--training.max_steps", "2"])
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_dialogue_longer_than_the_models_context_is_refused(prepared, tmp_path, capsys):
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    arguments = [*prepared.copy_to(tmp_path / "run"), "--model.name", str(base)]
    assert preprocess.main(arguments) == 0
    assert "exceeds the model's context of 64; lower prompt.max_length" in stopped(capsys, arguments)
