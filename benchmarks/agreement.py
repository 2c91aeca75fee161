"""Losses must agree before speeds are compared.

Every system says what each reply of a few dialogues costs it, in nats a token, with the same adapter and no dropout. The
reference is transformers' own model: one dialogue at a time, no padding, all logits, autograd. An adapter fresh from
initialization changes nothing, so that an error in it would not show; the check gives it weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kestrel.errors import ProofError

Row = dict[str, Any]
_WIDTH = 0.02  # standard deviation of the weights that the check gives to LoRA's second matrix
# Of the losses, relative to how far they spread over the replies, and of LoRA's gradient, relative to its norm. Against
# the spread, rounding (1% in bf16) is told from a reply that saw other dialogues (20%); a mean loss would hide both. A
# gradient has come through all layers, which round differently; one that is wrong is zero or far off.
TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (0.1, 0.2)}


def replies_of(rows: list[Row]) -> Iterator[tuple[int, tuple[int, int], Row]]:
    """(row number, span, the row with that one reply supervised) for each reply."""
    for number, row in enumerate(rows):
        for start, end in row["reply_spans"]:
            labels = [-100] * len(row["input_ids"])
            labels[start:end] = row["input_ids"][start:end]
            yield number, (start, end), {"input_ids": row["input_ids"], "labels": labels}


@contextmanager
def probing(model: torch.nn.Module) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The adapter's parameters by name, with weights that are the same for every system, and no dropout."""
    adapter = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    former = {name: parameter.detach().clone() for name, parameter in adapter.items()}
    dropouts = {module: module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(adapter.items()):
            width = _WIDTH if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    for module in dropouts:
        module.p = 0.0
    try:
        yield adapter
    finally:
        for module, p in dropouts.items():
            module.p = p
        with torch.no_grad():
            for name, parameter in adapter.items():
                parameter.copy_(former[name])
                parameter.grad = None


def write_reference(model: torch.nn.Module, rows: list[Row], path: Path) -> None:
    """What the replies cost transformers' own model, and LoRA's gradient of the mean over all their tokens."""
    device = next(model.parameters()).device
    losses: list[float] = []
    supervised = sum(end - start for row in rows for start, end in row["reply_spans"])
    model.train()
    with probing(model) as adapter:
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
            each = F.cross_entropy(logits, ids[0, 1:], reduction="none")
            spans = [each[start - 1 : end - 1] for start, end in row["reply_spans"]]
            losses += [span.mean().item() for span in spans]
            (torch.cat(spans).sum() / supervised).backward()
        gradient = {
            name: parameter.grad.float().cpu() for name, parameter in adapter.items() if parameter.grad is not None
        }
    torch.save({"losses": torch.tensor(losses), "gradient": gradient}, path)


def check(
    what: str,
    model: torch.nn.Module,
    rows: list[Row],
    loss_of: Callable[[int, tuple[int, int], Row], float],
    path: Path,
    dtype: str,
) -> float:
    """Compares a system's loss of each reply with the reference's.

    Args:
        what: the system's name, for the message.
        model: with its adapter.
        rows: of the dialogues that the reference was made of.
        loss_of: from `replies_of`'s values to the mean loss of the reply's tokens, in nats.
        path: of the reference.
        dtype: of the computation.

    Returns:
        The norm of the differences over the norm of the reference's losses around their mean.

    Raises:
        ProofError: more than rounding lies between them.
    """
    expected = torch.load(path)["losses"]
    with probing(model):
        losses = torch.tensor([loss_of(*reply) for reply in replies_of(rows)])
    apart = ((losses - expected).norm() / (expected - expected.mean()).norm()).item()
    if not apart <= TOLERANCE[dtype][0]:
        raise ProofError(
            f"{what} does not compute the loss that transformers' own model does: the replies' losses are {apart:.1%} of "
            "their spread apart"
        )
    return apart


def check_gradient(what: str, model: torch.nn.Module, backward: Callable[[], None], path: Path, dtype: str) -> float:
    """Compares LoRA's gradient of the mean loss with the reference's.

    Args:
        what, model, path, dtype: as for `check`.
        backward: computes it.

    Returns:
        The norm of the difference over the norm of the reference's.

    Raises:
        ProofError: more than rounding lies between them.
    """
    expected = torch.load(path)["gradient"]
    with probing(model) as adapter:
        backward()
        found = {
            name: parameter.grad.float().cpu() for name, parameter in adapter.items() if parameter.grad is not None
        }
    if found.keys() != expected.keys():
        raise ProofError(f"{what} gives a gradient to other weights than transformers' own model does")
    difference, norm = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
        for tensors in ([found[name] - expected[name] for name in expected], list(expected.values()))
    )
    if not difference <= TOLERANCE[dtype][1] * norm:
        raise ProofError(f"{what}'s gradient is {difference / norm:.1%} from that of transformers' own model")
    return difference / norm
