"""The negative log-likelihood of the supervised tokens, those with a label, and of no other.

The output head runs only where the next token is supervised (37% of Persona-Chat's tokens) and in chunks, so the logits,
65,024 float32 numbers per position for Falcon, never exist all at once.

Rows are padded on the right and attention is causal, so padding reaches no supervised position and no attention mask is
needed. Without a mask the fused attention kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kestrel.errors import ProofError
from kestrel.model.architecture import describe
from kestrel.model.decoder_layer import Recompute
from kestrel.model.fast_layers import FastBackbone
from kestrel.model.kernels.elementwise import nll
from kestrel.model.projection import Repeats
from kestrel.prompt.prompt import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_FINITE = (
    "the model gives a reply a likelihood that is not finite: its weights are broken, or numbers overflow in "
    "quantization.compute_dtype; bfloat16 and float32 have a wider range than float16"
)
# (causal LM, hidden (targets, hidden size), targets int64 (targets,)) -> a value per target, such as `nll_of_hidden`
OfHidden = Callable[["PreTrainedModel", torch.Tensor, torch.Tensor], torch.Tensor]
CHUNK = 512  # positions projected at once: 133 MB of float32 logits for Falcon's vocabulary


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model, without PEFT's wrapper if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A right-padded batch. The mask and labels of -100 mark padding; its id may be the end token's.

    Returns:
        int64 tensors: `input_ids`, `attention_mask` and `labels` (rows, longest); `predicting` (supervised tokens,), the
        positions in the flattened batch whose next token is supervised; `first` and `which`, as of `projection.Repeats`. The
        last three are computed here, on the host, because asking the GPU for them would stall it.
    """
    lengths = np.asarray([len(row["input_ids"]) for row in rows])
    ids = np.full((len(rows), lengths.max()), pad_id, dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    filled = np.arange(ids.shape[1]) < lengths[:, None]
    ids[filled] = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
    labels[filled] = np.concatenate([np.asarray(row["labels"], dtype=np.int64) for row in rows])
    predicting = np.zeros(labels.shape, dtype=bool)
    predicting[:, :-1] = labels[:, 1:] != IGNORED
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    arrays = {
        "input_ids": ids,
        "attention_mask": filled.astype(np.int64),
        "labels": labels,
        "predicting": np.flatnonzero(predicting),
        "first": first,
        "which": which.ravel(),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class _ProjectedNll(torch.autograd.Function):
    """Negative log-likelihoods through a frozen output head, with the gradient computed while the logits are in memory.

    A position's likelihood depends on its own hidden state alone, so the forward pass computes the gradient for unit
    weight and the backward pass scales it: the logits are neither kept nor computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = hidden[rows] @ weight.t()
            result[rows] = nll(logits, targets[rows], backward=grad is not None)
            if grad is not None:
                torch.mm(logits, weight, out=grad[rows])  # `nll` left the gradient in the logits
            del logits  # before the next ones are made
        ctx.grad = grad
        return result

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.grad * weights[:, None].to(ctx.grad.dtype), None, None


def _after_head(causal_lm: PreTrainedModel) -> tuple[float, float | None]:
    """The factor f and bound c (None: no bound) of an architecture's logits c tanh(f x / c).

    Cohere, Granite and Falcon-H1 have a factor, Gemma a bound (transformers 5.23). `prove_loss` detects anything else.
    """
    config = causal_lm.config
    factor = float(getattr(causal_lm, "logit_scale", 1.0))
    factor *= getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    return factor, getattr(config, "final_logit_softcapping", None)


def logits_of_hidden(causal_lm: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """(rows, vocabulary) from the last hidden states (rows, hidden size), in their type, as the architecture's own."""
    factor, bound = _after_head(causal_lm)
    logits: torch.Tensor = causal_lm.get_output_embeddings()(hidden)
    logits = logits if factor == 1 else logits * factor
    return logits if bound is None else bound * torch.tanh(logits / bound)


def _chunk_nll(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, factor: float, bound: float | None
) -> torch.Tensor:
    logits = head(hidden).float() * factor
    if bound is not None:
        logits = bound * torch.tanh(logits / bound)
    return F.cross_entropy(logits, targets, reduction="none")


def nll_of_hidden(causal_lm: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target.

    Args:
        causal_lm: with the output head.
        hidden: (targets, hidden size), the last hidden state before each target.
        targets: int64 (targets,), token ids.

    Returns:
        float32 (targets,) in nats.
    """
    head = causal_lm.get_output_embeddings()
    factor, bound = _after_head(causal_lm)
    hooked = head._forward_hooks or head._forward_pre_hooks
    plain = type(head) is nn.Linear and head.bias is None and bound is None
    if plain and not head.weight.requires_grad and not hooked:
        scaled = hidden if factor == 1 else hidden * factor
        result: torch.Tensor = _ProjectedNll.apply(scaled, head.weight, targets)
        return result
    pieces = []  # through autograd: a head with an adapter, a bias, a bound or a hook
    for states, expected in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_chunk_nll, head, states, expected, factor, bound, use_reentrant=False))
        else:
            pieces.append(_chunk_nll(head, states, expected, factor, bound))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


def _at_supervised_tokens(
    causal_lm: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    of_hidden: OfHidden,
    fused: FastBackbone | None,
) -> torch.Tensor:
    predicting = batch["predicting"]
    if fused is not None and fused.can_run():
        repeats = Repeats(batch["first"], batch["which"]) if "which" in batch else None
        hidden = fused.hidden_states(batch["input_ids"], predicting, repeats)
    else:
        backbone = getattr(causal_lm, causal_lm.base_model_prefix)
        states = backbone(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, predicting)
    targets = batch["labels"].flatten()[predicting + 1]
    return of_hidden(causal_lm, hidden, targets)


def attach_token_nll(model: nn.Module, recompute: Recompute = "none") -> None:
    """Makes the model's `forward` return values of the supervised tokens when `at_supervised_tokens` calls it.

    Going through `forward` runs the hooks of what wraps a model: PEFT, and sharding, which gathers the base.

    Args:
        model: the causal LM with or without an adapter.
        recompute: what the backward pass recomputes to save memory, as of `FastBackbone`. In architectures
            that `architecture.describe` does not know, mlp and full checkpoint each layer.
    """
    causal_lm = causal_lm_of(model)
    # Not the wrapper that an earlier call made.
    own_forward = getattr(causal_lm.forward, "own_forward", causal_lm.forward)
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    architecture = describe(backbone)
    fused = FastBackbone(backbone, architecture, recompute) if architecture is not None else None
    if recompute in ("mlp", "full") and (fused is None or not fused.can_run()):
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # `generate` reads the signature to decide whether a left-padded row needs position_ids, so it must stay visible.
    @functools.wraps(own_forward)
    def forward(*args: Any, of_hidden: OfHidden | None = None, **kwargs: Any) -> Any:
        if of_hidden is None:
            return own_forward(*args, **kwargs)
        # Everything is held in the compute type already. Under the Trainer's autocast, which float16 comes with, norms
        # would return float32, and the products behind them fail.
        place = kwargs["input_ids"].device.type
        with torch.autocast("cpu" if place == "meta" else place, enabled=False):  # meta: memory is estimated
            return {"result": _at_supervised_tokens(causal_lm, kwargs, of_hidden, fused)}

    forward.fast_layers, forward.own_forward = fused, own_forward  # type: ignore[attr-defined]
    causal_lm.forward = forward


def fast_layers_of(model: nn.Module) -> FastBackbone | None:
    """Kestrel's own layers, where the model was prepared by `attach_token_nll` and they can compute it."""
    fused: FastBackbone | None = getattr(causal_lm_of(model).forward, "fast_layers", None)
    return fused if fused is not None and fused.can_run() else None


def at_supervised_tokens(model: nn.Module, batch: dict[str, torch.Tensor], of_hidden: OfHidden) -> torch.Tensor:
    """What a function makes of each supervised token, inside the model's forward pass.

    Args:
        model: prepared by `attach_token_nll`.
        batch: from `collate`, on the model's device; `first` and `which` may be left out.
        of_hidden: called as `nll_of_hidden` is.

    Returns:
        The function's result, (supervised tokens, ...), row by row.
    """
    names = ("input_ids", "labels", "predicting", "first", "which")
    inputs = {name: batch[name] for name in names if name in batch}
    result: torch.Tensor = model(**inputs, of_hidden=of_hidden)["result"]
    return result


def token_nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of each supervised token, float32 (supervised tokens,) in nats; `at_supervised_tokens`."""
    return at_supervised_tokens(model, batch, nll_of_hidden)


@torch.no_grad()
def prove_loss(model: nn.Module, batch: dict[str, torch.Tensor], compute_dtype: str) -> None:
    """Compares `nll_of_hidden` with the likelihoods by the architecture's own logits, which may be scaled or capped.

    Both begin at the hidden states of transformers' layers. Those of the fast layers, which `prove_layers` compares, round
    otherwise, by more than 2% of the loss in bfloat16 where a model has large activations, as SmolLM2 does.

    Raises:
        ProofError: they differ by more than the compute type's rounding, or are not finite.
    """
    was_training = model.training
    model.eval()
    ours = _at_supervised_tokens(causal_lm_of(model), batch, nll_of_hidden, None)
    if not torch.isfinite(ours).all():
        raise ProofError(NOT_FINITE)
    theirs = library_nll(model, batch)
    model.train(was_training)
    difference = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-6)).item()
    if not difference <= (1e-4 if compute_dtype == "float32" else 2e-2):
        raise ProofError(
            f"the loss differs from this architecture's own by {difference:.2%}: its logits are changed after the output "
            "head in a way that Kestrel does not know. Use another base, or report it with the model's name"
        )


def library_nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As `token_nll`, by transformers' own layers and logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    return F.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="none")
