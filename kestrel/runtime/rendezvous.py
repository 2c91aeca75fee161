"""Joining the processes of one run, and refusing those that were started with different settings or libraries."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError
from kestrel.runtime.atomic import INCOMPLETE
from kestrel.runtime.distributed import (
    all_reduce_max,
    broadcast_from_first,
    is_first,
    rank,
    started_by_hand,
    world_size,
)
from kestrel.runtime.manifest import differences, library_versions
from kestrel.runtime.output import write_to_stderr

if TYPE_CHECKING:
    from kestrel.config.settings import Settings

_TIMEOUT = timedelta(hours=2)  # for which a process waits for the others, while one downloads a base, for example
_VISIBLE_WITHIN = 10.0  # seconds in which a network file system shows one machine what another wrote


def join_processes(settings: Settings) -> bool:
    """Connects this process with the others: gloo for CPU tensors, NCCL for those of GPUs.

    Returns:
        Whether to shard the base: accelerate's FSDP is on and the run has several processes.

    Raises:
        KestrelError: more processes than GPUs here, or settings, libraries or run folder are not the first process's, or
            accelerate was told to use DeepSpeed or the like.
    """
    import torch

    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise KestrelError(
                f"ACCELERATE_USE_{name}=true asks for what Kestrel does not use; launch with configs/accelerate/ddp.yaml or "
                f"fsdp.yaml, or: unset ACCELERATE_USE_{name}"
            )
    gpus = torch.cuda.device_count()
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus and local >= gpus:
        raise KestrelError(
            f"no GPU is left for process {rank()}: {here} processes were started on this machine, which has {gpus} "
            "GPUs; start one per GPU, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    if gpus > here:
        print(f"using {here} of this machine's {gpus} GPUs; torchrun --nproc_per_node {gpus} uses all of them")
    # Removed from the environment: `sharding` shards the base, and the libraries would shard everything again.
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and world_size() == 1:
        print("note: ACCELERATE_USE_FSDP=true has no effect on a single process, which holds the whole base")
    sharded = asked and world_size() > 1
    if world_size() == 1 or torch.distributed.is_initialized():
        return sharded
    if gpus:
        torch.cuda.set_device(local)
    with _announced_wait():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_TIMEOUT)
    _require_same(settings)
    return sharded


@contextmanager
def _announced_wait() -> Iterator[None]:
    """For processes without a launcher that ends them: says who is missing, and Ctrl-C ends a process while it waits.

    torch waits outside of Python, where no other handler of a signal would run.
    """
    if not started_by_hand():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    write_to_stderr(
        f"process {rank()} waits at {address} for all {world_size()} of WORLD_SIZE={world_size()}; if you started no others, "
        "stop it and run: unset WORLD_SIZE RANK LOCAL_RANK"
    )
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _require_same(settings: Settings) -> None:
    """Refuses processes with other settings, libraries or another run folder, which would fail hours later or silently."""
    folder = Path(settings.run_dir)
    installed = {name: version for name, version in library_versions().items() if name != "python"}
    mine = {**settings.model_dump(), "installed": installed}

    def first() -> tuple[dict[str, Any], str]:
        name = f".processes{INCOMPLETE}{uuid.uuid4().hex}"
        try:
            (folder / name).touch()
        except OSError:  # a dry run makes no folder, and may be of one that it must not write to
            return mine, ""
        return mine, name

    theirs, mark = broadcast_from_first(first)
    try:
        if different := list(differences(theirs, mine, "{} in the first process, {} in this one")):
            problem = f"process {rank()} has other settings or libraries than the first; use the same on all machines"
            raise KestrelError("\n  ".join([problem, *different]))
        if mark and not _appears(folder / mark):
            raise KestrelError(
                f"process {rank()} does not see what the first one writes to run_dir {folder}; use a folder on a file "
                "system that all machines share"
            )
        all_reduce_max(0)  # wait until all have looked
    finally:
        if mark and is_first():
            (folder / mark).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    until = time.monotonic() + _VISIBLE_WITHIN
    while not (appeared := path.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    return appeared
