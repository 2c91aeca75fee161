"""Frozen linear layers with their LoRA updates, several of which may read the same input.

    y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ        W: frozen, in 4 or 16 bit; A, B: trained (Hu and others, LoRA, 2021)

Layers that read the same input (queries, keys and values; gate and up) are one group: their outputs lie side by side in
one buffer, their weights are made dense in one buffer and multiplied at once, and one dropout mask serves them all, where
PEFT draws one for each. Nothing wide that can be made again is kept for the backward pass: not the dense weights, and not
the mask, which follows from its seed. dropout(x) Aᵀ is kept: making it again would read x once more for some bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kestrel.model.kernels.elementwise import dequantize
from kestrel.model.kernels.low_rank import add_input_gradient_, in_float32, project, project_gradient


class Repeats(NamedTuple):
    """Which positions of a flattened batch hold the same token.

    Attributes:
        first: int64 (distinct tokens,), one position of each.
        which: int64 (tokens,), for each position the index of its token in `first`.
    """

    first: Tensor
    which: Tensor

    def distinct(self, x: Tensor) -> Tensor:
        """(tokens, features) → (distinct tokens, features)."""
        return x.index_select(0, self.first)

    def spread(self, x: Tensor) -> Tensor:
        """(distinct tokens, features) → (tokens, features)."""
        return x.index_select(0, self.which)


class FrozenWeight:
    """The frozen weight of a linear layer, which is made dense where it is held in 4 bit.

    Args:
        layer: whose weight it is; the weight is not copied.
    """

    def __init__(self, layer: Any):
        self.state = getattr(layer.weight, "quant_state", None)
        self._held = layer.weight.detach().as_subclass(Tensor)  # without the cost of a subclass at each use

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """(outputs, inputs) in `dtype`; written into `out`, a tensor of that shape and type, where it is given."""
        if self.state is None:
            weight = self._held.to(dtype)
            return weight if out is None else out.copy_(weight)
        return dequantize(self._held, self.state, dtype, out)


class _Update(NamedTuple):
    """The LoRA update of one layer of a group.

    Attributes:
        a, b: float32 (rank, inputs) and (outputs, rank).
        scaling: of their product.
        columns: of the group's output, that it is added to.
        ranks: its place among the ranks of the group.
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    columns: slice
    ranks: slice


class Group:
    """Linear layers that read the same input. Activations are (tokens, features), in the compute type.

    Args:
        modules: nn.Linear, bitsandbytes' Linear4bit, or either in a LoRA layer of PEFT.
        has_room: what makes their input leaves `spare` behind its rows, where it can.
    """

    def __init__(self, modules: Sequence[Any], has_room: bool = False):
        self._bases = bases = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in modules]
        self._has_room = has_room
        self._weights = [FrozenWeight(base) for base in bases]
        ends = [0, *accumulate(base.out_features for base in bases)]
        self._columns = [slice(*pair) for pair in pairwise(ends)]
        self._shape = (ends[-1], bases[0].in_features)
        self._biases = [base.bias for base in bases]
        # Dense weights that are held as they are would be copied to lie side by side; they are multiplied one by one.
        self._apart = len(bases) > 1 and any(weight.state is None for weight in self._weights)
        self._dropout: Any = None
        self._updates: list[_Update] = []
        rank = 0
        for module, columns in zip(modules, self._columns, strict=True):
            if hasattr(module, "lora_A"):
                (name,) = module.active_adapters
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                ranks = slice(rank, rank + len(a))
                self._updates.append(_Update(a, b, float(module.scaling[name]), columns, ranks))
                self._dropout, self._switch, rank = module.lora_dropout[name], module, rank + len(a)
        self._a: Any = None
        self._b: Any = None
        self._joined: Any = None
        self._whole: Tensor | None = None  # dense weights that are kept

    @property
    def updates(self) -> list[_Update]:
        """Of the layers that have one; none where the adapter is switched off."""
        return [] if not self._updates or self._switch.disable_adapters else self._updates

    @property
    def spare(self) -> int:
        """Numbers of memory behind each row of the input; with them `forward` makes the update within the frozen product,
        and need not read and write all outputs again to add it; nor read their gradients again in the backward pass, whose
        product has this room behind its result. 0: they would not help.
        """
        ranks = self.updates[-1].ranks.stop if self.updates else 0
        in_4_bit = all(weight.state is not None for weight in self._weights)
        aligned = self._shape[1] % 64 == 0 and ranks % 16 == 0
        return ranks if self._has_room and in_4_bit and aligned and ranks <= 64 else 0

    def hold(self, dtype: torch.dtype, with_room: bool = False) -> list[tuple[Any, Tensor]]:
        """Keeps weights in 4 bit dense, side by side, until `let_go`; returns each layer and its part of them.

        Args:
            with_room: for B beside them, as `spare` says.
        """
        if self._apart or self._weights[0].state is None:
            return []
        inputs = self._shape[1]
        if self._whole is None or self._whole.dtype != dtype:
            self._whole = self._dense(dtype, inputs + (self.spare if with_room else 0))
        parts = zip(self._bases, self._columns, strict=True)
        return [(base, self._whole[columns, :inputs]) for base, columns in parts]

    def let_go(self) -> None:
        self._whole = None

    @property
    def is_dense(self) -> bool:
        return self._whole is not None or all(weight.state is None for weight in self._weights)

    def matrices(self) -> list[nn.Parameter]:
        """A and B of each update, in the order of what `backward_updates` returns."""
        return [matrix for update in self.updates for matrix in (update.a, update.b)]

    def copies(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The places where the products read the updates from, in the compute type: target, source, factor.

        The A matrices lie below each other, (ranks, inputs), and have the scaling in them; the B matrices are the blocks
        of one, (outputs, ranks), so that the whole group is updated by one product.
        """
        updates = self.updates
        if not updates:
            return
        if self._a is None or self._a.dtype != dtype:
            device, ranks = updates[0].a.device, updates[-1].ranks.stop
            self._a = torch.empty(ranks, self._shape[1], dtype=dtype, device=device)
            self._b = torch.zeros(self._shape[0], ranks, dtype=dtype, device=device)
        for update in updates:
            yield self._a[update.ranks], update.a.detach(), update.scaling
            yield self._b[update.columns, update.ranks], update.b.detach(), 1.0

    def forward(
        self, x: Tensor, seed: int, plus: Tensor | None = None, repeats: Repeats | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs side by side, (tokens, outputs), and dropout(x) Aᵀ, (tokens, ranks), for `backward_updates`.

        A sum that is rounded already stays as it is when less than half a unit of its last place is added, and in the first
        steps of training in 16 bits most of an update is less than that. So the update is added before anything is rounded,
        within the frozen product where there is room for it, else ahead of that. Outside training the order is that of PEFT's
        layers, which make the answers: likelihoods are those of what an adapter computes there.

        Args:
            x: (tokens, inputs).
            seed: of the dropout mask.
            plus: (tokens, outputs), which is added to the result.
            repeats: which rows of x are equal, so that the frozen weights need multiply them once; without `plus`.
        """
        low = project(x, self._a, self._p(), seed) if self.updates else None
        if low is None or repeats is not None:
            y = self._product(x, plus) if repeats is None else repeats.spread(self._product(repeats.distinct(x)))
            return (y if low is None else y.addmm_(low, self._b.t())), low
        training = self._switch.training
        if training and x.stride(0) - x.shape[1] >= self.spare > 0:
            wide = x.as_strided((len(x), x.shape[1] + self.spare), x.stride())  # y = [x | low] [W | B]ᵀ
            wide[:, x.shape[1] :] = low
            return self._product(wide, plus), low
        if x.dtype == torch.float32:
            return self._product(x, plus).addmm_(low, self._b.t()), low
        y = self._onto_update(x, low) if training else self._product(x).addmm_(low, self._b.t())
        # `plus` comes last: it may be far larger than the update, which rounding would then lose.
        return (y if plus is None else y.add_(plus)), low

    def _onto_update(self, x: Tensor, low: Tensor) -> Tensor:
        """The frozen product, added to the update before both are rounded, and last the bias."""
        y = low @ self._b.t()
        if self._apart:
            for weight, columns in zip(self._weights, self._columns, strict=True):
                y[:, columns].addmm_(x, weight.dense(x.dtype).t())
        else:
            y.addmm_(x, self._dense(x.dtype, x.shape[1]).t())
        bias = self._bias(x.dtype)
        return y if bias is None else y.add_(bias)

    def _product(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self._apart:
            y = x.new_empty(len(x), self._shape[0])
            for weight, bias, columns in zip(self._weights, self._biases, self._columns, strict=True):
                dense = weight.dense(x.dtype).t()
                if bias is None:
                    torch.mm(x, dense, out=y[:, columns])
                else:
                    torch.addmm(bias.to(x.dtype), x, dense, out=y[:, columns])
            return y
        dense = self._dense(x.dtype, x.shape[1]).t()
        bias = self._bias(x.dtype)
        if plus is not None:
            return torch.addmm(plus if bias is None else plus + bias, x, dense)
        return x @ dense if bias is None else torch.addmm(bias, x, dense)

    def _dense(self, dtype: torch.dtype, width: int) -> Tensor:
        """(outputs, width): the weights, and beside them B where they are narrower."""
        outputs, inputs = self._shape
        if self._whole is not None and self._whole.dtype == dtype and width <= self._whole.shape[1]:
            whole = self._whole[:, :width]
        elif len(self._weights) == 1 and width == inputs:
            return self._weights[0].dense(dtype)
        else:
            whole = torch.empty(outputs, width, dtype=dtype, device=self._weights[0]._held.device)
            for weight, columns in zip(self._weights, self._columns, strict=True):
                weight.dense(dtype, out=whole[columns, :inputs])
        if width > inputs:
            whole[:, inputs:] = self._b
        return whole

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """Of all layers side by side; made once, for it is frozen."""
        if all(bias is None for bias in self._biases):
            return None
        if self._joined is None or self._joined.dtype != dtype:
            self._joined = torch.zeros(self._shape[0], dtype=dtype, device=self._weights[0]._held.device)
            for bias, columns in zip(self._biases, self._columns, strict=True):
                if bias is not None:
                    self._joined[columns] = bias.detach()
        return self._joined

    def _p(self) -> float:
        return float(self._dropout.p) if isinstance(self._dropout, nn.Dropout) and self._dropout.training else 0.0

    def backward_input(self, grad: Tensor, seed: int, onto: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient of the input.

        Args:
            grad: (tokens, outputs), of the output.
            seed: as given to `forward`.
            onto: (tokens, inputs), which the result is added to in place.

        Returns:
            (tokens, inputs), whose rows may lie apart, and the gradient of dropout(x) Aᵀ, which `backward_updates` needs.
        """
        grad_x, grad_low = self._backward_products(grad, onto)
        if grad_low is not None:
            add_input_gradient_(grad_x, grad_low, self._a, self._p(), seed)
        return grad_x, grad_low

    def _backward_products(self, grad: Tensor, onto: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of the input by way of the frozen weights, and that of dropout(x) Aᵀ; one product, where there is room."""
        inputs, spare = self._shape[1], self.spare
        if onto is None and spare:
            wide = grad @ self._dense(grad.dtype, inputs + spare)  # grad [W | B]
            return wide[:, :inputs], wide[:, inputs:].contiguous()
        if self._apart:
            grad_x = onto
            for weight, columns in zip(self._weights, self._columns, strict=True):
                dense, part = weight.dense(grad.dtype), grad[:, columns]
                grad_x = part @ dense if grad_x is None else grad_x.addmm_(part, dense)
            assert grad_x is not None
        else:
            dense = self._dense(grad.dtype, inputs)
            grad_x = grad @ dense if onto is None else onto.addmm_(grad, dense)
        return grad_x, grad @ self._b if self.updates else None

    def backward_updates(
        self, grad: Tensor, grad_low: Tensor | None, x: Tensor | None, low: Tensor | None, seed: int
    ) -> list[Tensor]:
        """The gradients of `matrices`, in their types.

        Args:
            grad: (tokens, outputs), of the output.
            grad_low: from `backward_input`, or None where that was not needed.
            x: (tokens, inputs), the input; None where there is no update.
            low: from `forward`.
            seed: as given to `forward`.
        """
        updates = self.updates
        if not updates:
            return []
        assert x is not None and low is not None
        grad_low = grad @ self._b if grad_low is None else grad_low
        grad_a = project_gradient(grad_low, x, self._p(), seed)
        grad_b = in_float32(grad.t(), low)
        # One launch for the group, where its layers are scaled alike, as they are but for rank patterns.
        alike = len({update.scaling for update in updates}) == 1
        grad_a = grad_a.mul_(updates[0].scaling) if alike else grad_a
        results = []
        for update in updates:
            of_a = grad_a[update.ranks].to(update.a.dtype)
            results.append(of_a if alike else of_a * update.scaling)
            results.append(grad_b[update.columns, update.ranks].to(update.b.dtype))
        return results

    def backward(
        self, grad: Tensor, x: Tensor | None, low: Tensor | None, seed: int, onto: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`backward_input` and `backward_updates` at once."""
        grad_x, grad_low = self.backward_input(grad, seed, onto)
        return grad_x, self.backward_updates(grad, grad_low, x, low, seed)


def refresh(groups: Sequence[Group], dtype: torch.dtype) -> None:
    """Copies the LoRA matrices of some groups to where their products read them from; once for each pass.

    Casting them one by one at each use would be ten launches of a kernel a layer, most of a small model's time.
    """
    copies = [copy for group in groups for copy in group.copies(dtype)]
    if not copies:
        return
    targets = [target for target, _, _ in copies]
    torch._foreach_copy_(targets, [source for _, source, _ in copies])
    torch._foreach_mul_(targets, [factor for _, _, factor in copies])
