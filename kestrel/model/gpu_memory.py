"""GPU memory without gaps: torch's allocator maps memory into segments that grow."""

from __future__ import annotations

import os

import torch


def let_segments_grow(device: torch.device) -> bool:
    """Lets the allocator's segments grow, unless the user has set the allocator up; tells whether they do.

    Passes differ in length. Blocks of fixed sizes leave gaps between them, until the card is full and all of them are given
    back at once, which takes as long as a step. Virtual cards of some servers cannot map memory, and keep such blocks; so
    does Windows' subsystem for Linux, as in unsloth.
    """
    is_chosen = bool({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys())
    if device.type != "cuda" or is_chosen or "microsoft" in os.uname().release.lower():
        return False
    choose = torch._C._accelerator_setAllocatorSettings
    choose("expandable_segments:True")
    try:
        torch.empty(2**21, dtype=torch.uint8, device=device)
    except RuntimeError:
        choose("expandable_segments:False")
        return False
    return True
