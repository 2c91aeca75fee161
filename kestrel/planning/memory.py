"""What training takes in GPU memory, before a weight is loaded; and, for `answering.py`, how to count it.

The training step itself runs on the meta device, where tensors have shapes and no content, and every allocation is
counted until it is freed. So the count follows the code: the layers of any architecture, Kestrel's own where they know it,
LoRA's copies, and what the backward pass recomputes. Kernels that exist on a GPU only are replaced by what they allocate.
"""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import masking_utils

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError
from kestrel.model.architecture import describe
from kestrel.model.decoder_layer import Recompute
from kestrel.model.host_embedding import embedding_bytes
from kestrel.model.kernels import attention, cards, elementwise, low_rank
from kestrel.model.loss import attach_token_nll, causal_lm_of, fast_layers_of, token_nll
from kestrel.model.quantization import footprint_bytes
from kestrel.planning.random_base import random_base, random_model
from kestrel.runtime import distributed
from kestrel.runtime.machine import memory_used

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
# Bytes of optimizer state for a trained weight. The 8-bit optimizer's two bytes may be paged out, but start on the GPU.
_STATE_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_8bit": 2}
WORKSPACE = 64 * 2**20  # of cuBLAS, through torch's allocator, on recent GPUs
CONTEXT = 600 * 2**20  # CUDA's context and kernels, outside of torch's allocator
_LARGEST_FILE = 5 * 10**9  # bytes; transformers splits weights into files of this size
# Passes of more numbers in a layer's input than this are no faster on an H200 (docs/performance.md).
_SATURATING = 40 * 2**20
# Launching the kernels of a layer, forward and backward, takes a process so many seconds (an H200's machine, November 2026);
# computing them takes as many operations as this share of a card's peak rate gives.
_LAUNCHES_OF_A_LAYER, _REACHED = 0.006, 0.6
_SLACK_ON_A_CPU = 0.3  # of the peak: scratch space of the matrix products, and blocks between others that stay
_LATER_ON_A_CPU = 200 * 2**20  # bytes: libraries that are imported, and kernels that are compiled, after the estimate
SLACK = 0.08  # of the peak: fragments that the allocator cannot use


Substitute = tuple[Any, str, Any]  # module, name in it, and what stands for it


class CannotEstimate(KestrelError):
    """The architecture does not run on the meta device, or transformers makes the answers."""


@dataclass(frozen=True)
class Pass:
    """The shape of one forward and backward pass."""

    rows: int
    length: int  # of the longest row, in tokens
    supervised: int  # tokens with a label

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Needed(ABC):
    """Bytes on the device beside the tensors, and with them."""

    workspace: int = WORKSPACE
    overhead: int = CONTEXT  # outside of the tensors
    slack: float = SLACK

    @property
    @abstractmethod
    def peak(self) -> int:
        """Of all tensors, what `torch.cuda.max_memory_allocated()` returns at the end."""

    @property
    def needed(self) -> int:
        """The memory that a device must have: the peak, the allocator's slack and what is not in tensors."""
        return int(self.peak * (1 + self.slack)) + self.overhead


@dataclass(frozen=True)
class Estimate(Needed):
    """Bytes on the GPU during training."""

    base: int  # frozen weights and their quantization constants
    adapter: int  # LoRA's weights; their gradients take as much
    optimizer: int  # its state
    kept: int  # by the largest pass, for its backward pass
    momentary: int  # on top of that at the peak

    @property
    def peak(self) -> int:
        return self.base + 2 * self.adapter + self.optimizer + self.kept + self.momentary + self.workspace


class Estimator:
    """Estimates the memory of passes for one base and adapter.

    Args:
        sharded: each process holds a part of the layers' weights, and one layer whole.
        adapted: the base has an adapter.
    """

    def __init__(self, settings: Settings, config: PretrainedConfig, sharded: bool = False, adapted: bool = True):
        self._settings = settings
        self._config = config
        self._adapted = adapted
        # A card that is named is planned for wherever this runs.
        self.on_cpu = not torch.cuda.is_available() and settings.training.device_memory is None
        # Passes of so many tokens keep any GPU busy.
        self.saturating = _SATURATING // config.get_text_config().hidden_size
        self.model = functools.cache(self._new_model)
        model = self.model("none")
        causal_lm = causal_lm_of(model)
        knows_mlp = describe(getattr(causal_lm, causal_lm.base_model_prefix)) is not None
        # The values of training.recompute that differ for this architecture, least recomputation first.
        keeps_dense = knows_mlp and not sharded and settings.quantization.bits == 4
        self.levels: list[Recompute] = ["dense"] if keeps_dense else []
        self.levels += ["none", "mlp", "full"] if knows_mlp else ["none", "full"]
        base = (p for p in model.parameters() if not p.requires_grad)
        self.parameters = sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in base)
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.base = footprint_bytes(model) - self.adapter
        if sharded:
            self.base -= _bytes_of_others(causal_lm)
        # A pass of fewer tokens takes as long as one of so many, for its kernels are launched more slowly than computed.
        layers, rate = config.get_text_config().num_hidden_layers, _REACHED * (cards.peak_rate() or 0.0)
        self.busy = int(_LAUNCHES_OF_A_LAYER * layers * rate / (4 * self.parameters))
        # What of the base may stay in the machine's memory.
        self.embedding = 0 if self.on_cpu or distributed.world_size() > 1 else embedding_bytes(model)
        self._counted = functools.cache(self._count)

    def _new_model(self, recompute: Recompute) -> nn.Module:
        make = random_model if self._adapted else random_base
        model = make(self._settings, self._config, torch.device("meta"))
        attach_token_nll(model, recompute)
        return model.train()

    def estimate(self, shape: Pass, recompute: Recompute, embedding_on_host: bool = False) -> Estimate:
        """Memory at the peak of a training step whose largest pass has the given shape.

        Raises:
            CannotEstimate: the architecture does not run on the meta device.
        """
        kept, peak = self._counted(shape, recompute)
        optimizer = self.trainable * _STATE_BYTES[self._settings.training.optimizer]
        base = self.base - (self.embedding if embedding_on_host else 0)
        return Estimate(base, self.adapter, optimizer, kept, peak - kept, **self.around())

    def _count(self, shape: Pass, recompute: Recompute) -> tuple[int, int]:
        model = self.model(recompute)
        with self.on_shapes("set training.tokens_per_step and training.recompute"):
            counted = _run_on_shapes(model, shape)
        fast = fast_layers_of(model)
        for group in fast.groups() if fast is not None else ():
            group.let_go()  # so that the next count begins without them too
        return counted

    @contextmanager
    def on_shapes(self, remedy: str, more: Sequence[Substitute] = ()) -> Iterator[None]:
        """Inside, models on the meta device allocate what they would on the device that is planned for.

        Args:
            remedy: what the user is to do where that is not possible.
            more: what else is replaced.

        Raises:
            CannotEstimate: the architecture does not run on the meta device.
        """
        try:
            with replaced(self.on_cpu, more):
                yield
        except (
            NotImplementedError,  # torch: an operator that has no form on the meta device
            RuntimeError,  # and the others: an operator that reads values, which are not there
            TypeError,
            ValueError,
        ) as error:
            what = f"the memory of a {self._config.model_type} model cannot be estimated"
            raise CannotEstimate(f"{what} ({str(error).splitlines()[0]}); {remedy}") from error

    def around(self) -> dict[str, Any]:
        """What a device holds beside the tensors that are counted, as arguments of `Needed`."""
        if not self.on_cpu:
            return {}
        # This process as it is now, with its libraries, and the weights' file, which is mapped into memory.
        overhead = memory_used() + _LATER_ON_A_CPU + min(2 * self.parameters, _LARGEST_FILE)
        return {"workspace": 0, "overhead": overhead, "slack": _SLACK_ON_A_CPU}


def _bytes_of_others(causal_lm: Any) -> int:
    """Of a base, sharded over the processes of this run, what this one does not hold while it computes a layer."""
    layers = max((m for m in causal_lm.modules() if isinstance(m, nn.ModuleList)), key=len)
    sizes = [sum(p.nbytes for p in layer.parameters() if p.dim() > 1 and not p.requires_grad) for layer in layers]
    return sum(sizes) - sum(sizes) // distributed.world_size() - max(sizes)


def _run_on_shapes(model: nn.Module, shape: Pass) -> tuple[int, int]:
    """Bytes kept between forward and backward pass, and peak bytes."""
    ids = torch.empty(shape.rows, shape.length, dtype=torch.long, device="meta")
    batch = {"input_ids": ids, "labels": torch.empty_like(ids), "predicting": ids.new_empty(shape.supervised)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    with Allocations(tensors_of(model, batch.values())) as allocations:
        loss = token_nll(model, batch).sum()
        kept = allocations.live
        loss.backward()
    return kept, allocations.peak


def tensors_of(model: nn.Module, more: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Every tensor that exists before the step."""
    yield from more
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        state = getattr(parameter, "quant_state", None)
        for level in (state, getattr(state, "state2", None)):
            yield from (t for t in (vars(level) if level is not None else {}).values() if isinstance(t, torch.Tensor))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors created while it is active, until they are freed.

    Args:
        existing: tensors that are not counted.
    """

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        self._known: dict[int, Any] = {}
        self.live = self.peak = 0
        for tensor in existing:
            self._register(tensor, counts=False)

    def _register(self, tensor: torch.Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:  # a view, or the result of an in-place operation
            return
        size = storage.nbytes() if counts else 0

        def free(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._register(leaf)
        return result


# -- what a GPU does, on the meta device -------------------------------------------------------------------------------


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Keeps its inputs, its output and a number per query; the meta device would keep all scores."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    result: torch.Tensor = flash(query, key, value, 0.0, True)[0]
    return result


def _fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Keeps a byte per number; the meta device would keep a number."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _torch(x: torch.Tensor) -> str:
    return "torch"


_needs_no_mask = masking_utils._ignore_causal_mask_sdpa


def _needs_no_mask_on_shapes(padding_mask: torch.Tensor | None, *arguments: Any, **named: Any) -> bool:
    """Of rows whose lengths differ; transformers would read from the mask whether they do (5.17 to 5.23)."""
    return padding_mask is None and _needs_no_mask(None, *arguments, **named)


@contextmanager
def replaced(on_cpu: bool, more: Sequence[Substitute] = ()) -> Iterator[None]:
    """Layers on the meta device allocate what they do on a GPU, or with torch's own operations on a CPU.

    (A TorchFunctionMode misses what checkpoints recompute.)
    """
    mask = lambda x, p, seed: torch.empty_like(x, dtype=torch.bool)
    cpu = [(attention, "place_of", _torch), (elementwise, "place_of", _torch), (low_rank, "_kept", mask)]
    substitutes: list[Substitute] = [
        *(cpu if on_cpu else []),
        *more,
        (F, "scaled_dot_product_attention", _flash_attention),
        (F, "dropout", _fused_dropout),
        # It reads the positions to find packed rows (transformers 5.23); Kestrel never packs.
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        (masking_utils, "_ignore_causal_mask_sdpa", _needs_no_mask_on_shapes),
    ]
    with ExitStack() as restore:
        for module, name, substitute in substitutes:
            restore.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, substitute)
        yield
