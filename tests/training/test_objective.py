"""The objective against transformers' logits: what it covers, what a token weighs, and its value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_models import make_model

from kestrel.model.loss import attach_token_nll
from kestrel.prompt.prompt import IGNORED
from kestrel.training import objective

PAD = 11


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made = make_model().eval()
    attach_token_nll(made)
    return made


def make_rows() -> list[dict[str, Any]]:
    """Three rows of which every third token and the last are supervised."""
    draw = np.random.default_rng(0)
    rows = []
    for length in (12, 31, 7):
        ids = draw.integers(12, 300, size=length)
        supervised = np.arange(length) % 3 == 1
        supervised[-1] = True
        rows.append({"input_ids": ids, "labels": np.where(supervised, ids, IGNORED)})
    return rows


def reference_loss(model: Any, ids: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """The objective for one row, from the logits."""
    logits = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(labels)[1:], ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("cuts", [[[0, 1, 2]], [[2, 0], [1]]])
def test_a_step_is_the_mean_over_its_tokens_however_it_is_cut(model: Any, cuts: list[list[int]]) -> None:
    rows = make_rows()
    passes = [objective.collate([rows[i] for i in cut], PAD) for cut in cuts]
    loss = sum(objective.summed_loss(model, batch) for batch in passes) / objective.step_weight(rows)
    total = sum(reference_loss(model, row["input_ids"], row["labels"]) for row in rows)
    assert objective.step_weight(rows) == sum(int((row["labels"] != IGNORED).sum()) for row in rows)
    assert loss.item() == pytest.approx(total.item() / objective.step_weight(rows), rel=1e-5)


def test_validation_is_the_likelihood_of_the_same_tokens(model: Any) -> None:
    rows = make_rows()
    nll, tokens = objective.validation_nll(model, objective.collate(rows, PAD))
    assert tokens == objective.step_weight(rows) and nll.dtype == torch.float64
    total = sum(reference_loss(model, row["input_ids"], row["labels"]) for row in rows)
    assert nll.item() == pytest.approx(total.item(), rel=1e-5)


def test_loss_and_weight_follow_the_labels(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss on every token, say."""
    monkeypatch.setattr(
        objective, "labels_of", lambda row: np.where(np.arange(len(row["input_ids"])), row["input_ids"], IGNORED)
    )
    rows = make_rows()
    assert objective.step_weight(rows) == sum(len(row["input_ids"]) - 1 for row in rows)
    total = sum(reference_loss(model, row["input_ids"], row["input_ids"]) for row in rows)
    assert objective.summed_loss(model, objective.collate(rows, PAD)).item() == pytest.approx(total.item(), rel=1e-5)
