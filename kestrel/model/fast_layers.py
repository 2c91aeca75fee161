"""A backbone whose decoder layers are computed by `decoder_layer.py`, for the architectures of `architecture.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kestrel.model.architecture import Architecture
from kestrel.model.decoder_layer import Attending, DecoderLayer, Layer, Recompute
from kestrel.model.projection import Group, Repeats, refresh


class FastBackbone:
    """A backbone whose layers are computed by this module.

    Args:
        backbone: with its frozen weights and its adapter, if it is to have one.
        architecture: of `architecture.describe`.
        recompute: what the backward pass makes again beside the dense weights. mlp: the MLP's first product; full: the
            attention too, so that of each layer only the input is kept; dense: nothing, the dense weights are kept too.
    """

    def __init__(self, backbone: Any, architecture: Architecture, recompute: Recompute):
        self._backbone, self._architecture, self._keeps_dense = backbone, architecture, recompute == "dense"
        layers = backbone.get_submodule(architecture.layers)
        self._inside = [module for layer in layers for module in layer.modules()]
        self._adapted = [module for module in self._inside if hasattr(module, "lora_A")]
        self._is_plain = all(is_plain_lora(module) for module in self._adapted)
        self._layers = [
            Layer(layer, architecture, window, recompute)
            for layer, window in zip(layers if self._is_plain else [], architecture.windows, strict=self._is_plain)
        ]

    def can_run(self) -> bool:
        """Whether nothing is hooked into the layers (by what shards or traces them) and no adapter is merged."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self._inside)
        return self._is_plain and not hooked and not any(module.merged for module in self._adapted)

    def groups(self) -> list[Group]:
        """All linear layers, those of the same input together."""
        return [group for layer in self._layers for group in layer.groups()]

    def is_dense(self) -> bool:
        """Whether the products need not make their weights dense first."""
        return all(group.is_dense for group in self.groups())

    def hidden_states(
        self,
        input_ids: Tensor,
        wanted: Tensor,
        repeats: Repeats | None = None,
        positions: Tensor | None = None,
        attending: Attending | None = None,
    ) -> Tensor:
        """The backbone's last hidden state at some places, for rows padded on the right.

        Args:
            input_ids: int64 (rows, length).
            wanted: int64 (wanted,), places in the flattened batch; none of them padding.
            repeats: of `input_ids`, if known; the result is the same without.
            positions: int64 (1, length), where they are not 0, 1, ...: of what continues an earlier pass by the same adapter.
            attending: attention, layer by layer; without gradient only.

        Returns:
            (wanted, hidden) in the compute type.
        """
        backbone, architecture = self._backbone, self._architecture
        embedding = backbone.get_submodule(architecture.embedding)
        x = embedding(input_ids)
        if not len(wanted) and attending is None and not torch.is_grad_enabled():
            return x.new_zeros(0, x.shape[-1])
        # Since transformers 5.2x the embedding scales, also within a LoRA layer.
        scales = any(hasattr(module, "embed_scale") for module in embedding.modules())
        if architecture.embedding_scale != 1 and not scales:
            x = x * torch.tensor(architecture.embedding_scale, dtype=x.dtype)
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            refresh(self.groups(), x.dtype)
            for group in self.groups() if self._keeps_dense else ():
                group.hold(x.dtype, with_room=True)
        kinds = architecture.rotaries or ("",) * len(self._layers)
        rotations = {
            kind: tuple(t[0].contiguous() for t in backbone.rotary_emb(x, positions, *([kind] if kind else [])))
            for kind in set(kinds)
        }
        seeds = torch.randint(2**62, (len(self._layers),)).tolist() if backbone.training else [0] * len(self._layers)
        first, last = self._layers[0], self._layers[-1]
        # Kernels need a row at least, also where only keys and values are wanted.
        some = wanted if len(wanted) else wanted.new_zeros(1)
        for layer, seed, kind in zip(self._layers, seeds, kinds, strict=True):
            rows = some if layer is last else None
            # Equal tokens are computed once, unless an adapter of the embedding wants the gradient of each.
            equal = repeats if layer is first and first is not last and not x.requires_grad else None
            x = DecoderLayer.apply(x, *rotations[kind], rows, equal, attending, layer, seed, *layer.matrices())
        normed: Tensor = backbone.get_submodule(architecture.final_norm)(x[: len(wanted)])
        return normed


def is_plain_lora(module: Any) -> bool:
    """Whether a layer of PEFT has one adapter of two matrices, without biases or a variant of LoRA that computes more."""
    matrices = (*module.lora_A.values(), *module.lora_B.values())
    active = list(module.active_adapters)
    plain = len(active) == 1 and active[0] in module.lora_A and not module.lora_variant
    return plain and all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices)
