"""How many rows share a pass without gradient: as configured, or as the free memory holds; fewer where it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from tqdm import tqdm

from kestrel.model.loss import causal_lm_of
from kestrel.runtime.machine import memory_available

R = TypeVar("R")
Given: TypeAlias = "Budget | int | Literal['auto']"  # tokens of a pass, or as many as fit
# What a position of a pass takes while its layer is computed, in hidden states: the layer's input, norm, fused projection,
# attention, and an MLP of four times the width before and after its activation; LoRA has some in float32.
_HIDDEN_STATES = 24
_MLP_WIDTHS = 3  # of a wider MLP, in addition: gate, up and their product
# Shares of the free memory. Keys and values of a group of sequences take a fifth and what a last pass adds.
_OF_A_PASS, _OF_CONTINUATIONS = 0.2, 0.4
OF_A_CPU = 0.25  # of its free memory; the rest is other programs'
MOST_TOKENS = {"cuda": 65_536, "cpu": 8192}  # of a pass; larger ones are no faster


class Budget:
    """What a batch may take.

    Attributes:
        tokens: most tokens of a pass over whole sequences, padding included.
        bytes_per_position: about what such a pass takes for each, besides keys and values that are kept; with LoRA on all layers
            up to 1.6 times as much, which the shares leave room for.
    """

    def __init__(self, model: torch.nn.Module, tokens: int | Literal["auto"]):
        config = causal_lm_of(model).config.get_text_config()
        width, inner = int(config.hidden_size), getattr(config, "intermediate_size", None) or 0
        numbers = max(_HIDDEN_STATES * width, 8 * width + _MLP_WIDTHS * inner)
        self.bytes_per_position = numbers * causal_lm_of(model).dtype.itemsize
        self._memory: float | None = None
        if tokens != "auto":
            self.tokens = tokens
            return
        device = next(model.parameters()).device
        free = _rounded(free_memory(device))
        self._memory = _OF_CONTINUATIONS * free
        kept = _kept_per_token(config) * causal_lm_of(model).dtype.itemsize
        fitting = int(_OF_A_PASS * free) // (self.bytes_per_position + kept)
        self.tokens = max(1, min(MOST_TOKENS["cuda" if device.type == "cuda" else "cpu"], fitting))

    @classmethod
    def of(cls, model: torch.nn.Module, given: Given) -> Budget:
        """The budget as it is, or that of a number of tokens."""
        return given if isinstance(given, Budget) else cls(model, given)

    def continuation_memory(self, bytes_per_token: int) -> int:
        """Bytes that a batch of continuations may take; without auto as much as a pass, or as its keys and values.

        Args:
            bytes_per_token: of keys and values in all layers.
        """
        if self._memory is not None:
            return int(self._memory)
        return self.tokens * max(self.bytes_per_position, bytes_per_token)

    def passes(self, lengths: Sequence[int], run: Callable[[Sequence[int]], R]) -> Iterator[tuple[Sequence[int], R]]:
        """`in_batches` of rows of similar length, by their positions in `lengths`, the longest first."""
        order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
        return self.in_batches(order, lambda left: self.tokens // max(1, lengths[left[0]]), run)

    def in_batches(
        self, left: Sequence[int], fitting: Callable[[Sequence[int]], int], run: Callable[[Sequence[int]], R]
    ) -> Iterator[tuple[Sequence[int], R]]:
        """Works through a list in batches from its beginning. Where memory runs out, this and later ones are smaller.

        Args:
            left: what is to be done; what takes most comes first, so that memory runs out at once or never.
            fitting: how many of the first of these share a batch; at least one does.
            run: does a batch.

        Raises:
            OutOfMemoryError: one alone does not fit.
        """
        most = len(left)
        while left:
            batch, result = left[: max(1, min(most, fitting(left)))], None
            try:
                result = run(batch)
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not _is_out_of_memory(error):
                    raise
                most = len(batch) // 2
            if result is None:  # after the exception is gone: its frames hold the memory to be freed
                self._halve(most)
                continue
            yield batch, result
            left = left[len(batch) :]

    def _halve(self, rows: int) -> None:
        self.tokens = max(1, self.tokens // 2)
        if self._memory is not None:
            self._memory /= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tqdm.write(f"out of memory: from now on {rows:,} rows share a pass; the answers do not change")


def _is_out_of_memory(error: BaseException) -> bool:
    """Also of a CPU, where torch (2.13) raises no type of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _rounded(count: int) -> int:
    """Down to three binary digits, so that a run on the same machine makes the same batches."""
    below = max(0, count.bit_length() - 3)
    return count >> below << below


def free_memory(device: torch.device) -> int:
    """Bytes that this process may take now: of the GPU, its allocator's cache included, or of a quarter of the CPU's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(OF_A_CPU * memory_available())


def _kept_per_token(config: Any) -> int:
    """Numbers of a token's keys and values in all layers."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon-7B's
        kv_heads = 1
    return int(2 * config.num_hidden_layers * kv_heads * size)
