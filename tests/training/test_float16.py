"""Training in float16 under the Trainer's autocast and loss scaling, on the CPU in place of a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from test_trainer import log_of

import train
from kestrel.training.trainer import DialogueTrainer


@pytest.fixture
def scaled(monkeypatch):
    """Lets the Trainer do on the CPU what it does on a GPU in float16, from a scale of the loss."""

    def begin_at(scale: float) -> None:
        own = DialogueTrainer.create_accelerator_and_postprocess

        def create(self):
            own(self)
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        monkeypatch.setattr(DialogueTrainer, "create_accelerator_and_postprocess", create)

    yield begin_at
    AcceleratorState._reset_state()


def arguments_in(prepared, run, dtype: str) -> list[str]:
    return [*prepared.copy_to(run), "--quantization.compute_dtype", dtype, "--training.evaluations", "1"]


def test_losses_are_those_of_float32_and_skipped_steps_are_counted(prepared, tmp_path, capsys, scaled):
    assert train.main(arguments_in(prepared, tmp_path / "wide", "float32")) == 0
    scaled(2.0**10)
    assert train.main(arguments_in(prepared, tmp_path / "half", "float16")) == 0
    assert "was skipped" not in capsys.readouterr().out
    pairs = zip(log_of(tmp_path / "wide"), log_of(tmp_path / "half"), strict=True)
    for expected, found in pairs:
        for key in {"loss", "eval_loss"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=0.01)
    scaled(2.0**24)
    assert train.main(arguments_in(prepared, tmp_path / "skipped", "float16")) == 0
    printed = capsys.readouterr().out
    assert "step 1 was skipped: its gradient exceeds float16's range" in printed and "(steps skipped: 2)" in printed
    lines = log_of(tmp_path / "skipped")
    assert len(lines) == 10 and all(math.isfinite(value) for line in lines for value in line.values())


def test_a_gradient_that_no_scale_makes_finite_is_refused(prepared, tmp_path, capsys, scaled, monkeypatch):
    monkeypatch.setattr(
        "kestrel.training.objective.token_nll",
        lambda model, batch: (
            next(p for p in model.parameters() if p.requires_grad).sum()[None] * (math.inf if model.training else 1.0)
        ),
    )
    scaled(4.0)
    assert train.main(arguments_in(prepared, tmp_path / "run", "float16")) == 1
    assert (
        "the gradient of step 3 is not finite in float16, however small the loss is scaled" in capsys.readouterr().err
    )
