"""The machine under a benchmark: what it is, how fast it multiplies, how much memory a training loop takes, and when."""

from __future__ import annotations

import resource
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from kestrel.errors import KestrelError
from kestrel.model import base
from kestrel.runtime.manifest import git_commit, library_versions

device_name = base.device_name


def synchronize() -> None:
    """Waits until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def facts_of_a_measurement(command: str, device: str | None = None) -> dict[str, Any]:
    """What a record says of where its figures come from.

    Args:
        command: that prints them.
        device: where they were measured; None: here.
    """
    return {
        "command": command,
        "device": device or device_name(),
        "versions": library_versions(),
        "commit": git_commit(),
        "date": datetime.now(tz=UTC).date().isoformat(),
    }


def compute_dtype() -> str:
    """bfloat16 where the device multiplies in it; a CPU without AVX512-BF16 is faster in float32."""
    fast = torch.cuda.is_available() or any("avx512_bf16" in line for line in _lines("/proc/cpuinfo"))
    return "bfloat16" if fast else "float32"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def matrix_size() -> int:
    """Rows of matrices whose product keeps the device busy, and a CPU not too long."""
    return 8192 if torch.cuda.is_available() else 2048


def matrix_rate(size: int, dtype: str) -> float:
    """FLOP/s of a product of two (size, size) matrices of random numbers: the median of 20 after 5 for warm-up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(25):
        synchronize()
        began = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(seconds[5:])[10]


def reset_peak_memory() -> None:
    """Lets the peak begin anew: torch's on a GPU, the kernel's count of resident pages without one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # not Linux: the peak is then of the whole process
            return


def peak_memory() -> int:
    """Bytes at the peak since the last reset."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mark() -> Any:
    """A point in the device's work: an event of the GPU, which nothing waits for, or the time."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(earlier: Any, later: Any) -> float:
    return later - earlier if isinstance(later, float) else earlier.elapsed_time(later) / 1e3


class Stopwatch(TrainerCallback):
    """Times optimizer steps of a Trainer, and counts the positions that its model computes, padding included.

    Args:
        model: whose embedding is watched.
        warmup: steps before the clock starts.
        steps: steps that are timed.

    The positions are of the timed steps, the peak of memory is of all steps.
    """

    def __init__(self, model: torch.nn.Module, warmup: int, steps: int):
        self._first, self._last = warmup, warmup + steps
        self._count = 0
        self._marks: list[Any] = []  # after each step
        self._first_step_at = 0.0
        self._readings: dict[str, Any] = {}
        model.get_input_embeddings().register_forward_pre_hook(self._see)  # type: ignore[operator]

    def _see(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._count += inputs[0].numel()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        reset_peak_memory()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._marks.append(_mark())
        if state.global_step == 1:
            synchronize()
            self._first_step_at = time.time()
        if state.global_step == self._first:
            synchronize()
            self._began, self._processor_began, self._count = time.perf_counter(), time.process_time(), 0
        elif state.global_step == self._last:
            synchronize()
            seconds = time.perf_counter() - self._began
            timed = self._marks[self._first - 1 : self._last]
            self._readings = {
                "seconds": seconds,
                "step_seconds": [_seconds_between(*pair) for pair in pairwise(timed)],
                "first_step_at": self._first_step_at,
                "processor_seconds": time.process_time() - self._processor_began,
                "positions": self._count,
                "peak_bytes": peak_memory(),
                "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] if torch.cuda.is_available() else 0,
            }

    def readings(self) -> dict[str, Any]:
        """seconds, step_seconds (of each step), processor_seconds (of all threads), positions, peak_bytes, and
        first_step_at, when the very first step had ended, in seconds since 1970.

        Raises:
            KestrelError: training ended before the last step that was to be timed.
        """
        if not self._readings:
            raise KestrelError(f"training ended before step {self._last}")
        return self._readings
