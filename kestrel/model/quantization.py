"""The workaround for layers that the 4-bit quantizer skips, and the audit that proves what was loaded.

transformers 5.5 and later quantizes a layer only if its class is exactly `torch.nn.Linear`. Falcon's layers are
`FalconLinear`, a subclass, so `load_in_4bit=True` loads Falcon in 16 bit, reports 4 bit, and warns of something else.
`test_audit_fails_without_the_remedy` passes as long as the workaround is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kestrel.config.settings import Quantization
from kestrel.errors import ProofError
from kestrel.model.kernels import cards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE = 64  # weights that share one quantization constant, bitsandbytes' default
NESTED_BLOCK_SIZE = 256  # constants that share one constant of the second level
_FOOTPRINT_TOLERANCE = 0.02
_UNQUANTIZED_SHARE = 0.10


@contextmanager
def quantizable_layers() -> Iterator[None]:
    """Makes Falcon's linear layers plain ones while a model is loaded, so that the quantizer replaces them.

    `FalconLinear` computes `x @ W.T + b`, which is what `nn.Linear` computes; in bf16 the two agree to the bit.
    """
    from transformers.models.falcon import modeling_falcon

    original = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = original


def forbid_repacking(model: nn.Module) -> None:
    """Stops bitsandbytes (0.50) from repacking weights in place at the first evaluation on CPUs with AVX512-BF16.

    After that, gradients are zero or wrong without any error; `train()` does not undo it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  nn.Module declares no such attribute


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the compute type of a base that was saved in 4 bit, which loads with the type it was saved with."""
    for module in model.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            module.compute_dtype = state.dtype = dtype  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()):  # embedding, head, norms and biases
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.to(dtype)


@dataclass(frozen=True)
class Audit:
    """What a loaded base holds. Bytes count parameters, buffers and quantization constants."""

    bits: int
    layers_4bit: int
    layers_expected: int
    quant_type: str | None
    double_quant: bool | None
    compute_dtype: str
    footprint_bytes: int
    footprint_expected_bytes: int
    parameters: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for the terminal."""
        held = (
            f"{self.layers_4bit} of {self.layers_expected} linear layers in {self.quant_type}"
            if self.bits == 4
            else "no 4-bit layer"
        )
        nested = ", double quantization" if self.double_quant else ""
        return (
            f"{self.parameters / 1e6:,.1f}M parameters, {held}{nested}, {self.compute_dtype}; "
            f"{self.footprint_bytes / 2**20:,.1f} MiB, by arithmetic {self.footprint_expected_bytes / 2**20:,.1f}"
        )


def concrete(wanted: Quantization) -> Quantization:
    """With this machine's compute type in place of auto. Scripts ask `adapter.compute_dtype` first, which looks at runs."""
    if wanted.compute_dtype != "auto":
        return wanted
    return wanted.model_copy(update={"compute_dtype": cards.best_dtype()})


def linear_layers(skeleton: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(in, out) features of each layer that 4-bit loading must quantize, by name: all linear ones but the output head.

    Args:
        skeleton: the unquantized architecture, on the meta device.
    """
    output = skeleton.get_output_embeddings()
    layers: dict[str, tuple[int, int]] = {}
    for name, module in skeleton.named_modules():
        if module is output:
            continue
        if isinstance(module, nn.Linear):
            layers[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer, transposed
            layers[name] = (module.weight.shape[0], module.weight.shape[1])
    return layers


def audit(model: PreTrainedModel, skeleton: PreTrainedModel, wanted: Quantization) -> Audit:
    """Compares a loaded base with the settings.

    Args:
        model: loaded, before LoRA.
        skeleton: the same architecture unquantized, on the meta device.
        wanted: the settings.

    Raises:
        ProofError: layers left out, another quantization, another compute type, or bytes that do not add up.
    """
    import bitsandbytes as bnb

    expected = linear_layers(skeleton)
    in_4bit = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    unpacked = [name for name, module in in_4bit.items() if not _is_packed(module)]
    problems = [f"{name} is a 4-bit layer whose weight is not packed 4-bit" for name in unpacked]
    if wanted.bits == 4:
        problems += _skipped_layers(model, skeleton, expected, in_4bit.keys())
        problems += _other_quantization([in_4bit[name] for name in in_4bit if name not in unpacked], wanted)
        problems += _wrong_rows(in_4bit.values(), wanted) if model.device.type == "cpu" else []
    elif in_4bit:
        problems.append(f"{len(in_4bit)} layers are in 4 bit; the settings ask for {wanted.bits} bits")
    problems += _other_dtypes(model, wanted.compute_dtype, in_4bit.keys())
    footprint = footprint_bytes(model)
    arithmetic = expected_footprint_bytes(skeleton, wanted)
    if abs(footprint - arithmetic) > _FOOTPRINT_TOLERANCE * arithmetic:
        problems.append(f"the base takes {footprint:,} bytes; the arithmetic gives {arithmetic:,}")
    if problems:
        raise ProofError(
            "the base is not what quantization asks for:\n  "
            + "\n  ".join(problems)
            + "\n  Try quantization.bits: 16, or report it with the versions of transformers and bitsandbytes."
        )
    return Audit(
        bits=wanted.bits,
        layers_4bit=len(in_4bit),
        layers_expected=len(expected),
        quant_type=wanted.type if in_4bit else None,
        double_quant=wanted.double_quant if in_4bit else None,
        compute_dtype=wanted.compute_dtype,
        footprint_bytes=footprint,
        footprint_expected_bytes=arithmetic,
        parameters=sum(p.numel() for p in skeleton.parameters()),
    )


def _is_packed(layer: Any) -> bool:
    """Whether a layer's weight holds two 4-bit values per byte, whatever type the bytes are stored as."""
    state = getattr(layer.weight, "quant_state", None)
    return state is not None and 2 * layer.weight.numel() * layer.weight.element_size() == state.shape.numel()


def _skipped_layers(
    model: PreTrainedModel, skeleton: PreTrainedModel, expected: dict[str, tuple[int, int]], in_4bit: Collection[str]
) -> list[str]:
    """What should be in 4 bit and is not."""
    if not expected:
        return ["the architecture has no linear layer that could be quantized"]
    problems = []
    skipped = sorted(expected.keys() - set(in_4bit))
    if skipped:
        problems.append(
            f"{len(skipped)} of {len(expected)} linear layers are not in 4 bit, such as {skipped[0]} "
            f"({type(model.get_submodule(skipped[0])).__name__})"
        )
    others = _unquantized_share(skeleton, expected)
    if others > _UNQUANTIZED_SHARE:
        problems.append(f"{others:.0%} of the parameters are neither linear layers nor embeddings and stay in 16 bit")
    return problems


def _other_quantization(layers: Sequence[Any], wanted: Quantization) -> list[str]:
    """How the 4-bit layers differ from the settings."""
    held = [
        (layer.weight.quant_state.quant_type, bool(layer.weight.quant_state.nested), _name(layer.compute_dtype))
        for layer in layers
    ]
    problems = []
    asked = (wanted.type, wanted.double_quant, wanted.compute_dtype)
    for index, what in enumerate(("quantization type", "double quantization", "compute type")):
        values = {layer[index] for layer in held}
        if values - {asked[index]}:
            listed = ", ".join(map(str, sorted(values)))
            problems.append(f"{what} is {listed}; the settings ask for {asked[index]}")
    return problems


def _wrong_rows(layers: Iterable[Any], wanted: Quantization) -> list[str]:
    """bitsandbytes (0.50) on CPUs dequantizes rows wrongly that are not of whole blocks; measured, not told by its version."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    wrong = []
    for inputs in sorted({layer.in_features for layer in layers if layer.in_features % BLOCK_SIZE}):
        rows = torch.randn(BLOCK_SIZE, inputs, generator=torch.Generator().manual_seed(0))
        dense, right = (
            dequantize_4bit(*quantize_4bit(form, quant_type=wanted.type)) for form in (rows, rows.view(-1, BLOCK_SIZE))
        )
        if not torch.equal(dense.view_as(right), right):
            wrong.append(
                f"bitsandbytes computes wrongly on CPUs with layers of {inputs:,} inputs, no multiple of {BLOCK_SIZE}"
            )
    return wrong


def _other_dtypes(model: PreTrainedModel, compute_dtype: str, in_4bit: Collection[str]) -> list[str]:
    """Linear layers and embeddings that are held neither in 4 bit nor in the compute type."""
    return [
        f"{name or 'the model'} is held in {_name(module.weight.dtype)}; the settings ask for {compute_dtype}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
        and isinstance(module.weight, torch.Tensor)
        and name not in in_4bit
        and _name(module.weight.dtype) != compute_dtype
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unquantized_share(skeleton: PreTrainedModel, linear: dict[str, tuple[int, int]]) -> float:
    """Share of parameters that are neither in the given layers nor embeddings, such as fused experts."""
    skipped = {id(p) for name in linear for p in skeleton.get_submodule(name).parameters()}
    skipped |= {id(p) for module in skeleton.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    output = skeleton.get_output_embeddings()
    skipped |= {id(p) for p in output.parameters()} if output is not None else set()
    rest = sum(p.numel() for p in skeleton.parameters() if id(p) not in skipped)
    return rest / max(1, sum(p.numel() for p in skeleton.parameters()))


def footprint_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters, buffers and quantization constants take."""
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for level in (state, getattr(state, "state2", None)):
            if level is not None:
                total += level.absmax.numel() * level.absmax.element_size()
    return total


def expected_footprint_bytes(skeleton: PreTrainedModel, wanted: Quantization) -> int:
    """Bytes by arithmetic: half a byte a weight and its constants in 4-bit layers, compute_dtype elsewhere."""
    size = getattr(torch, concrete(wanted).compute_dtype).itemsize
    other = sum(p.numel() for p in skeleton.parameters()) * size
    other += sum(b.numel() * b.element_size() for b in skeleton.buffers())
    if wanted.bits != 4:
        return other
    quantized = 0
    for inputs, outputs in linear_layers(skeleton).values():
        weights = inputs * outputs
        blocks = -(-weights // BLOCK_SIZE)
        constants = blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) if wanted.double_quant else 4 * blocks
        quantized += weights // 2 + constants
        other -= weights * size
    return quantized + other
