"""The proof, at the start of each run, that Kestrel's own decoder layers compute what transformers' and PEFT's compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kestrel.errors import ProofError
from kestrel.model.kernels import cards
from kestrel.model.loss import causal_lm_of, fast_layers_of, library_nll, token_nll
from kestrel.prompt.prompt import IGNORED

_ROUNDINGS = 3  # which show how far rounding alone may lead, where the layers differ by much


def prove_layers(model: nn.Module, batch: dict[str, torch.Tensor], compute_dtype: str) -> str:
    """Compares the LoRA gradients of the fast layers with those of transformers' and PEFT's layers, without dropout.

    B begins at zero, where A has no gradient; meanwhile it is random. Weights, gradients and random state stay as they are.

    Args:
        model: prepared by `attach_token_nll`, with a fresh adapter.
        batch: from `collate`, on the model's device; the first 64 tokens of its first row are taken.

    Returns:
        Which layers will compute, and what was proven, for the terminal.

    Raises:
        ProofError: they differ by more than the compute type's rounding, where a base enlarges it by twice what it does to
            transformers' own; naming the matrix that differs most.
    """
    backbone = getattr(causal_lm_of(model), causal_lm_of(model).base_model_prefix)
    kind = backbone.config.model_type
    if fast_layers_of(model) is None:
        return f"layers: transformers' own; Kestrel's do not cover this {kind}, its adapter or its sharding"
    was_training = model.training
    model.eval()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.training = True  # but not its dropout: the sums have training's order
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.detach().clone() for name, p in trained.items()}
    generator = torch.Generator().manual_seed(0)
    for p in trained.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    ids = batch["input_ids"][:1, :64]
    labels = torch.cat((torch.full_like(ids[:, :1], IGNORED), ids[:, 1:]), dim=1)
    short = {"input_ids": ids, "labels": labels, "predicting": torch.arange(ids.shape[1] - 1, device=ids.device)}
    ours, theirs = (_gradients(model, short, nll_by) for nll_by in (token_nll, library_nll))
    apart = _apart(ours, theirs)
    difference = math.hypot(*apart.values())
    by_rounding = 0.0
    if not difference <= (allowed := 1e-3 if compute_dtype == "float32" else 0.2):
        by_rounding = _by_rounding(model, short, theirs)
    for name, p in trained.items():
        p.data.copy_(kept[name])
    model.train(was_training)
    if not difference <= max(allowed, 2 * by_rounding):
        worst = max(apart, key=lambda name: apart[name])
        raise ProofError(
            f"the fast layers for {kind} compute other LoRA gradients than transformers' ({difference:.2%} apart, most in "
            f"{worst}); report it with the model's name and the version of transformers"
        )
    proven = f"proven: their LoRA gradients are transformers' ({difference:.1%} apart)"
    if by_rounding:
        proven = (
            f"their LoRA gradients are {difference:.0%} from transformers', which rounding alone changes by {by_rounding:.0%}: "
            "this base enlarges it"
        )
    proven = f"layers: Kestrel's own for {kind}; {proven}"
    if cards.is_before_ampere():
        proven += f"\nattention and LoRA's dropout: torch's own; Kestrel's kernels need sm_80 or later, this is {cards.name()}"
    return proven


def _gradients(
    model: nn.Module, batch: dict[str, torch.Tensor], nll_by: Callable[[Any, Any], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of the summed likelihoods, by the name of the trained matrix; the model's own are left without."""
    nll_by(model, batch).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each gradient lies from another, as a share of the norm of all."""
    total = math.hypot(*(g.norm().item() for g in theirs.values()))
    return {name: (ours[name] - g).norm().item() / total if name in ours else math.inf for name, g in theirs.items()}


def _by_rounding(model: nn.Module, batch: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """How far transformers' gradients go when the embedded tokens change by as much as their type rounds; the most of some."""
    found = []
    for seed in range(_ROUNDINGS):
        with _rounded_otherwise(model, seed):
            found.append(math.hypot(*_apart(_gradients(model, batch, library_nll), theirs).values()))
    return max(found)


@contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Changes the embedded tokens by as much as their type rounds."""

    def change(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(output.device).manual_seed(seed)
        noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
        return output * (1 + torch.finfo(output.dtype).eps / 2 * noise).to(output.dtype)

    hook = causal_lm_of(model).get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()
