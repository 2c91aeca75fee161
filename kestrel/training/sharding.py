"""A base that is too large for one GPU, sharded over several: each holds a part of every layer.

Only frozen weights are sharded, by torch's `fully_shard`: a layer's 4-bit weights are gathered when it is computed and
freed afterwards. Embedding, head, and the adapter, a thousandth of the base, stay whole in each process. So checkpoints
and adapters are the same with and without sharding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Settings
from kestrel.errors import ProofError
from kestrel.model.base import device, load_base
from kestrel.model.loss import attach_token_nll, causal_lm_of
from kestrel.runtime import distributed

if TYPE_CHECKING:
    from peft import PeftModel


_TOLERANCE = 1e-3  # relative difference of logits; the same kernels compute them from the same bits


@torch.no_grad()
def shard(model: PeftModel) -> str:
    """Shards the base's layers, loaded with to_be_sharded. Returns how much this process still holds, for the terminal.

    Raises:
        ProofError: the sharded model computes something else.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.eval()
    causal_lm = causal_lm_of(model)
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    layers = max((m for m in backbone.children() if isinstance(m, nn.ModuleList)), key=len)
    ids = torch.arange(16, device=device())[None]
    before, whole = model(input_ids=ids).logits, _held_bytes(layers)
    for module in layers.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.quant_state = state  # where bitsandbytes (0.50) looks when the weight is a plain tensor
    kept = {p for p in model.parameters() if p.requires_grad}
    sharded = {p for p in layers.parameters() if not p.requires_grad}
    mesh = init_device_mesh(device().type, (distributed.world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()) - sharded)
    # The Trainer's DistributedDataParallel must see the adapter alone.
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    difference = ((model(input_ids=ids).logits - before).norm() / before.norm()).item()
    if not difference <= _TOLERANCE:
        raise ProofError(
            f"the sharded base computes something else than the whole one (logits differ by {difference:.2%}); train without "
            "sharding (configs/accelerate/ddp.yaml), or report it with the versions of torch and bitsandbytes"
        )
    return (
        f"sharded: this process holds {_held_bytes(layers) / whole:.0%} of the {whole / 2**20:,.1f} MiB of the layers' "
        "weights; proven: the logits are the same"
    )


def _held_bytes(layers: nn.Module) -> int:
    """Bytes of frozen weights in this process."""
    from torch.distributed.tensor import DTensor

    frozen = (p for p in layers.parameters() if not p.requires_grad)
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)


def unsharded(model: PeftModel, settings: Settings) -> PeftModel:
    """The trained adapter on a base that is loaded again, whole."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights: dict[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    base, _ = load_base(settings)
    whole = add_lora(base, settings.lora, settings.seed)
    set_peft_model_state_dict(whole, weights)
    attach_token_nll(whole)
    return whole


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is sharded, so that no process can compute without the others."""
    if distributed.world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
