"""What the GPUs of each generation can do and hold, as far as the kernels and the compute type depend on it.

KESTREL_CARD=sm_75 lets a run keep within the limits of another card: a newer one computes what a T4 would.
"""

from __future__ import annotations

import functools
import os
import re

import torch

from kestrel.errors import KestrelError

# Bytes of shared memory that a block may take, by compute capability ("Technical Specifications per Compute Capability",
# NVIDIA's CUDA C++ Programming Guide). A capability that is not listed takes the figure of the one before it.
SHARED_MEMORY = {
    (7, 0): 98_304, (7, 5): 65_536, (8, 0): 166_912, (8, 6): 101_376, (8, 7): 166_912, (8, 9): 101_376,
    (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448, (12, 0): 101_376,
}  # fmt: skip
REGISTERS = 65_536  # of a block, on each of them
# Operations per second of dense bfloat16 products, by NVIDIA's data sheets (float16 on a T4).
_PEAK_RATES = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L4": 121e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip


@functools.cache
def capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, or of the card that KESTREL_CARD names; None without a GPU.

    Raises:
        KestrelError: KESTREL_CARD is no compute capability.
    """
    if forced := os.environ.get("KESTREL_CARD"):
        match = re.fullmatch(r"sm_(\d+)(\d)", forced)
        if match is None:
            raise KestrelError(f"KESTREL_CARD is {forced!r}; expected a compute capability such as sm_75, or nothing")
        return int(match[1]), int(match[2])
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def name() -> str:
    """Such as sm_75."""
    return "sm_{}{}".format(*(capability() or ("", "?")))


def is_before_ampere() -> bool:
    """Whether the GPU is of a generation on which Triton (3.9) multiplies matrices without the matrix units."""
    found = capability()
    return found is not None and found < (8, 0)


def shared_memory() -> int:
    """Bytes of shared memory that a kernel may take on this card; 0 without a GPU."""
    return _shared_memory_of(capability())


@functools.cache
def _shared_memory_of(found: tuple[int, int] | None) -> int:
    return SHARED_MEMORY[max(listed for listed in SHARED_MEMORY if listed <= max(found, (7, 0)))] if found else 0


def peak_rate() -> float | None:
    """Operations per second of this process's GPU, where it is a known one."""
    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_name()
    return next((rate for known, rate in _PEAK_RATES.items() if re.search(rf"\b{known}\b", card)), None)


def best_dtype() -> str:
    """The compute type that suits this machine: bfloat16 where it is computed in hardware, float16 on older GPUs."""
    found = capability()
    if found is not None:
        return "bfloat16" if found >= (8, 0) else "float16"
    cpu = torch.cpu
    return "bfloat16" if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() else "float32"
