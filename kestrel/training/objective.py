"""The training objective: which tokens the loss covers, what each weighs in an optimizer step, and the loss itself.

    L(θ) = − Σ_{t ∈ S} log p_θ(x_t | x_{<t}) / |S|       S: the tokens of the persona owner's replies, ends included

|S| is counted over the global batch, so neither accumulation nor the number of processes changes what a token weighs.

Another objective changes this module and no other (CONTRIBUTING.md has the recipe). Validation always reports the
likelihood of the same tokens, so runs with different objectives can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kestrel.data.dataset import supervised_of
from kestrel.model import loss
from kestrel.model.loss import token_nll
from kestrel.prompt.prompt import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ["input_ids", "labels"]  # of a dataset row


def labels_of(row: dict[str, Any]) -> Any:
    """int64 (tokens,): the token's own id where the loss covers it, IGNORED elsewhere."""
    return row["labels"]


def tokens_in_loss(rows: Dataset) -> np.ndarray:
    """int64 (rows,): how many tokens `labels_of` keeps in each row, for the memory estimate."""
    return supervised_of(rows)


def step_weight(rows: Sequence[dict[str, Any]]) -> int:
    """What the summed loss of an optimizer step is divided by.

    Args:
        rows: all rows of the step, over all processes.
    """
    return sum(int(np.count_nonzero(labels_of(row) != IGNORED)) for row in rows)


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """The batch of one forward pass, as `model.loss.collate` returns it."""
    return loss.collate([{"input_ids": row["input_ids"], "labels": labels_of(row)} for row in rows], pad_id)


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of one forward pass before it is divided by `step_weight`: a float32 scalar with a graph.

    `model.loss.at_supervised_tokens` gives another function of hidden states and targets the same pass.
    """
    return token_nll(model, batch).sum()


@torch.no_grad()
def validation_nll(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of a batch, a float64 scalar in nats, and its number of tokens."""
    nll = token_nll(model, batch)
    return nll.double().sum(), len(nll)
