"""4-bit asked means 4-bit held: the remedy for layers that the quantizer skips, and the audit that proves it.

transformers 5.5 and later quantizes a layer only if its class is exactly `torch.nn.Linear`. Falcon's layers are
`FalconLinear`, a subclass, so that `load_in_4bit=True` loads Falcon in 16 bit, says that it is in 4 bit, and warns of
something else. The test `test_audit_fails_without_the_remedy` passes as long as the remedy is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kestrel.config.settings import Quantization
from kestrel.errors import ProofError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE = 64  # weights that share one quantization constant, bitsandbytes' default
NESTED_BLOCK_SIZE = 256  # constants that share one constant of the second level
_FOOTPRINT_TOLERANCE = 0.02
_UNQUANTIZED_SHARE = 0.10


@contextmanager
def quantizable_layers() -> Iterator[None]:
    """Lets the quantizer see Falcon's linear layers for what they are while a model is loaded.

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

    After it, training goes on with zero or wrong gradients and says nothing; `train()` does not undo it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  nn.Module declares no such attribute


@dataclass(frozen=True)
class Audit:
    """What a loaded base really is. Bytes are of parameters, buffers and quantization constants."""

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
    """Compares a loaded base with what the settings ask for.

    Args:
        model: loaded, before LoRA.
        skeleton: the same architecture unquantized, on the meta device.
        wanted: the settings.

    Raises:
        ProofError: layers left out, another quantization, another compute type, or bytes that do not add up.
    """
    import bitsandbytes as bnb

    expected = linear_layers(skeleton)
    found = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    problems = []
    types, nested, computes = set(), set(), set()
    for name, module in found.items():
        state = getattr(module.weight, "quant_state", None)
        # The storage type is whatever the packed bytes are seen as: uint8, or for sharding the compute type.
        if state is None or 2 * module.weight.numel() * module.weight.element_size() != state.shape.numel():
            problems.append(f"{name} is a 4-bit layer whose weight is not packed 4-bit")
            continue
        types.add(state.quant_type)
        nested.add(bool(state.nested))
        computes.add(str(module.compute_dtype).removeprefix("torch."))
    if wanted.bits == 4:
        skipped = sorted(expected.keys() - found.keys())
        if skipped:
            problems.append(
                f"{len(skipped)} of {len(expected)} linear layers are not in 4 bit, such as {skipped[0]} "
                f"({type(model.get_submodule(skipped[0])).__name__})"
            )
        if not expected:
            problems.append("the architecture has no linear layer that could be quantized")
        for what, seen, want in (
            ("quantization type", types, wanted.type),
            ("double quantization", nested, wanted.double_quant),
            ("compute type", computes, wanted.compute_dtype),
        ):
            if found and seen != {want}:
                problems.append(f"{what} is {', '.join(map(str, sorted(seen))) or 'unknown'}, asked for was {want}")
        others = _unquantized_share(skeleton, expected)
        if others > _UNQUANTIZED_SHARE:
            problems.append(
                f"{others:.0%} of the parameters are neither linear layers nor embeddings and stay in 16 bit"
            )
    elif found:
        problems.append(f"{len(found)} layers are in 4 bit, asked for were {wanted.bits} bits")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.Embedding)) and isinstance(weight, torch.Tensor) and name not in found:
            dtype = str(weight.dtype).removeprefix("torch.")
            if dtype != wanted.compute_dtype:
                problems.append(f"{name or 'the model'} is held in {dtype}, asked for was {wanted.compute_dtype}")
    footprint = footprint_bytes(model)
    arithmetic = expected_footprint_bytes(skeleton, wanted)
    if abs(footprint - arithmetic) > _FOOTPRINT_TOLERANCE * arithmetic:
        problems.append(f"the base takes {footprint:,} bytes where {arithmetic:,} were expected")
    if problems:
        raise ProofError(
            "the base is not what quantization asks for:\n  "
            + "\n  ".join(problems)
            + "\n  Try quantization.bits: 16, or report it with the versions of transformers and bitsandbytes."
        )
    return Audit(
        bits=wanted.bits,
        layers_4bit=len(found),
        layers_expected=len(expected),
        quant_type=types.pop() if types else None,
        double_quant=nested.pop() if nested else None,
        compute_dtype=wanted.compute_dtype,
        footprint_bytes=footprint,
        footprint_expected_bytes=arithmetic,
        parameters=sum(p.numel() for p in skeleton.parameters()),
    )


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
    size = {"bfloat16": 2, "float16": 2, "float32": 4}[wanted.compute_dtype]
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
