"""A base that is too large for one GPU, sharded over several: each process holds a part of every layer's frozen weights.

As in fully sharded data parallelism (Zhao and others, PyTorch FSDP, 2023), a layer is gathered when it is computed, in the
forward and again in the backward pass, and dropped when the next layer is gathered. Only frozen weights are sharded, so
nothing flows back but the adapter's gradients. torch's `fully_shard` is not used: it shards tensors of floating point only,
with 4-bit weights on GPUs it computed other logits (16% apart on Falcon-7B's shape, torch 2.11, bitsandbytes 0.50), and its
hooks are not run by Kestrel's fast layers. Here the bytes of a layer lie in one buffer, whatever they mean.

Embedding, head, norms, quantization constants and the adapter, which together are a few percent of the base, stay whole in
each process. So checkpoints and adapters are the same with and without sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kestrel.errors import ProofError
from kestrel.model.base import device
from kestrel.model.loss import causal_lm_of
from kestrel.runtime import distributed

if TYPE_CHECKING:
    from peft import PeftModel

_ALIGNED = 16  # bytes, at which each weight begins: the widest load of a GPU
_NO_MORE = -1


class _Shard:
    """The frozen matrices of one layer.

    Attributes:
        part: uint8, what this process holds of them.
        whole: uint8, all of them; its storage is empty but while the layer is gathered.
    """

    def __init__(self, layer: nn.Module):
        weights = [p for p in layer.parameters() if p.dim() > 1 and not p.requires_grad]
        starts, size = [], 0
        for weight in weights:
            starts.append(size)
            size += -(-weight.nbytes // _ALIGNED) * _ALIGNED
        each = -(-size // (distributed.world_size() * _ALIGNED)) * _ALIGNED
        loaded = torch.zeros(each * distributed.world_size(), dtype=torch.uint8, device=device())
        for weight, start in zip(weights, starts, strict=True):
            loaded[start : start + weight.nbytes] = weight.detach().contiguous().view(-1).view(torch.uint8)
        self.part = loaded[each * distributed.rank() :][:each].clone()
        self.whole = torch.empty_like(loaded)
        for weight, start in zip(weights, starts, strict=True):
            held = self.whole[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            weight.data = held
        self._bytes = self.whole.untyped_storage().nbytes()
        self.gather()
        if not torch.equal(self.whole, loaded):
            raise ProofError(
                "a gathered layer has other bytes than were loaded: the processes loaded different weights; see that all "
                "read the same model folder, or train without sharding (configs/accelerate/ddp.yaml)"
            )
        self.drop()

    def gather(self) -> None:
        self.whole.untyped_storage().resize_(self._bytes)
        # The weights are views of this buffer that autograd may have saved. Their content is the same each time.
        with torch.autograd._unsafe_preserve_version_counter(self.whole):  # type: ignore[attr-defined]
            torch.distributed.all_gather_into_tensor(self.whole, self.part)

    def drop(self) -> None:
        self.whole.untyped_storage().resize_(0)


class _Shards:
    """The layers of a model; at most one is whole at a time. All processes gather the same layers in the same order."""

    def __init__(self, layers: nn.ModuleList):
        self.shards = [_Shard(layer) for layer in layers]
        self._whole: int | None = None
        self._led = False

    def gather(self, index: int) -> None:
        """Makes one layer whole, and drops the one that was."""
        if index == self._whole:
            return
        if self._led:
            self._announce(index)
        if self._whole is not None:
            self.shards[self._whole].drop()
        self._whole = index
        self.shards[index].gather()

    def _announce(self, index: int) -> int:
        """The first process's index, in all processes."""
        message = torch.tensor([index], device=device())
        torch.distributed.broadcast(message, 0)
        return int(message)

    @contextmanager
    def led_by_first(self) -> Iterator[None]:
        """Within, the first process computes alone: before, the others gather what it announces until it has ended."""
        if not distributed.is_first():
            while (index := self._announce(_NO_MORE)) != _NO_MORE:
                self.gather(index)
            yield
            return
        self._led = True
        try:
            yield
        finally:
            self._led = False
            self._announce(_NO_MORE)


class _GatherInBackward(torch.autograd.Function):
    """The identity of a layer's output, whose backward pass begins with gathering the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Any) -> Tensor:
        ctx.gather = gather
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.gather()
        return grad, None


def shard(model: PeftModel) -> str:
    """Shards the base's layers, wherever they were loaded to, and moves the rest to this process's device.

    Must be called before `attach_token_nll`. Returns how much this process holds, and what was proven, for the terminal.

    Raises:
        ProofError: the gathered weights are not those that were loaded.
    """
    layers = _layers_of(model)
    whole = sum(p.nbytes for p in layers.parameters() if p.dim() > 1 and not p.requires_grad)
    shards = _Shards(layers)
    for index, layer in enumerate(layers):
        _gathered_first(layer, shards, index)
    layers.shards = shards  # type: ignore[assignment]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.to(device())
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device()))
    for p in model.parameters():
        p.data = p.data.to(device())  # empty ones are there already
    causal_lm = causal_lm_of(model)
    causal_lm.hf_device_map = {"": device()}  # which accelerate compares with the device it trains on
    # The Trainer's DistributedDataParallel must see the adapter alone.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    held = sum(one.part.nbytes for one in shards.shards)
    return (
        f"sharded: this process holds {held / whole:.0%} of the {whole / 2**20:,.1f} MiB of the layers' weights; proven: "
        "gathered, each layer has the bytes that were loaded"
    )


def _layers_of(model: nn.Module) -> nn.ModuleList:
    causal_lm = causal_lm_of(model)
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    return max((m for m in backbone.modules() if isinstance(m, nn.ModuleList)), key=len)


def _gathered_first(layer: nn.Module, shards: _Shards, index: int) -> None:
    """Gathers a layer before its own forward and backward pass; the fast layers ask for it by `gather_weights`."""
    own_forward = layer.forward

    def gather() -> None:
        shards.gather(index)

    def forward(*args: Any, **kwargs: Any) -> Any:
        gather()
        out = own_forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return _GatherInBackward.apply(out, gather)
        return (_GatherInBackward.apply(out[0], gather), *out[1:])

    layer.forward = forward
    layer.gather_weights = gather  # type: ignore[assignment]


@contextmanager
def led_by_first(model: nn.Module) -> Iterator[None]:
    """Where the first process alone is to compute with a model: the others hold out their parts of a sharded base first."""
    if not is_sharded(model):
        yield
        return
    shards: Any = _layers_of(model).shards
    with shards.led_by_first():
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is sharded, so that no process can compute without the others."""
    return distributed.world_size() > 1 and hasattr(_layers_of(model), "shards")
