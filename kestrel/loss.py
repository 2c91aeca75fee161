"""The training objective: the negative log-likelihood of the supervised tokens, and of nothing else.

    L(θ) = − Σ_{t ∈ S} log p_θ(x_t | x_{<t}) / |S|       S: the tokens of the owner's replies, ends included

|S| is counted over the whole global batch, so that neither accumulation nor the number of processes changes what a
token weighs. The vocabulary is projected onto only at positions in S (37% of Persona-Chat's tokens) and in chunks,
so that the logits, 65,024 float32 numbers a position for Falcon, never exist all at once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kestrel.errors import ProofError
from kestrel.prompt import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_FINITE = (
    "the model gives a reply a likelihood that is not finite: its weights are broken, or numbers overflow in "
    "quantization.compute_dtype, where bfloat16 and float32 have more room than float16"
)
CHUNK = 1024  # positions projected at a time: 266 MB of float32 logits for Falcon's vocabulary


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside an adapter or inside nothing."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 batch (rows, longest): input_ids, attention_mask, labels.

    Which tokens are padding is said by the mask and by labels of -100, never by their id, which may be the end token's.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
        mask[index, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _chunk_nll(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _token_nll(causal_lm: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    head = causal_lm.get_output_embeddings()
    hidden = backbone(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    hidden, targets = hidden[:, :-1][kept], targets[kept]
    pieces = []
    for states, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_chunk_nll, head, states, wanted, use_reentrant=False))
        else:
            pieces.append(_chunk_nll(head, states, wanted))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


def install(model: nn.Module) -> None:
    """Lets the model's `forward` return the supervised tokens' likelihoods when called as `token_nll` calls it.

    Going through `forward` keeps what wraps a model in the way: PEFT's hooks and the gradient synchronization of
    several processes.
    """
    causal_lm = causal_lm_of(model)
    own_forward = causal_lm.forward

    # `generate` reads the signature to decide whether a left-padded row needs position_ids, so it must stay visible.
    @functools.wraps(own_forward)
    def forward(*args: Any, nll_only: bool = False, **kwargs: Any) -> Any:
        if not nll_only:
            return own_forward(*args, **kwargs)
        return {"nll": _token_nll(causal_lm, kwargs)}

    causal_lm.forward = forward


def token_nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of each supervised token.

    Args:
        model: prepared by `install`.
        batch: from `collate`, on the model's device.

    Returns:
        float32 (supervised tokens,) in nats, row by row.
    """
    nll: torch.Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], nll_only=True
    )["nll"]
    return nll


@torch.no_grad()
def prove_loss(model: nn.Module, batch: dict[str, torch.Tensor], compute_dtype: str) -> None:
    """Checks our likelihoods against the architecture's own logits, which may be scaled or capped after the head.

    Raises:
        ProofError: they differ by more than the compute type's rounding, or are not finite.
    """
    was_training = model.training
    model.eval()
    ours = token_nll(model, batch)
    if not torch.isfinite(ours).all():
        raise ProofError(NOT_FINITE)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    theirs = F.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="none")
    model.train(was_training)
    difference = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-6)).item()
    if not difference <= (1e-4 if compute_dtype == "float32" else 2e-2):
        raise ProofError(
            f"the loss is not this architecture's own: {difference:.2%} apart; its logits are changed after the output "
            "head, which Kestrel's projection at supervised positions does not know"
        )
