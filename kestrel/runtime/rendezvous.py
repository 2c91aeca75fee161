"""Joining the processes of one run, and refusing those that were given different things."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError
from kestrel.runtime.distributed import all_reduce_max, broadcast_from_first, is_first, rank, world_size

if TYPE_CHECKING:
    from kestrel.config.settings import Settings

_PATIENCE = timedelta(hours=2)  # a process waits for the others: while one downloads a base, say
_SEEN_WITHIN = 10.0  # seconds in which a network file system shows one machine what another wrote


def why_alone() -> str | None:
    """A warning where several processes were asked for and one was started; None where all is well.

    accelerate (1.15) launches one process on CPUs whatever its --num_processes; where that is above 1 it leaves
    MASTER_PORT in the environment, but no WORLD_SIZE.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "accelerate was asked for several processes and started one, as it does on CPUs; "
            "torchrun --nproc_per_node N starts N"
        )
    return None


def join_processes(settings: Settings) -> bool:
    """Lets this process meet the others. CPU tensors travel by gloo, those of GPUs by NCCL.

    Args:
        settings: of the run, as this process was given them.

    Returns:
        Whether the launcher asks for sharding (accelerate's FSDP) and there are processes to share with.

    Raises:
        KestrelError: this process has no GPU of its own; or one has other settings or libraries than the first, or
            another run folder.
    """
    import torch

    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus and local >= gpus:
        raise KestrelError(
            f"process {rank()} has no GPU of its own: {here} processes were started on this machine, which has "
            f"{gpus} GPUs; start as many as there are, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if gpus > here:
        print(
            f"{here} of this machine's {gpus} GPUs {'is' if here == 1 else 'are'} used; "
            f"torchrun --nproc_per_node {gpus} uses all"
        )
    # Taken out of the environment: `sharding` does it, and the libraries would do it again, adapter and all.
    sharded = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true" and world_size() > 1
    if world_size() == 1 or torch.distributed.is_initialized():
        return sharded
    if gpus:
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    _require_alike(settings)
    return sharded


def _require_alike(settings: Settings) -> None:
    """Refuses machines that were given different things, which would go wrong after hours, or in silence."""
    from kestrel.runtime.atomic import LEFT_BY_A_KILL
    from kestrel.runtime.manifest import differences, library_versions

    folder = Path(settings.run_dir)
    installed = {name: version for name, version in library_versions().items() if name != "python"}
    mine = {**settings.model_dump(), "installed": installed}

    def first() -> tuple[dict[str, Any], str]:
        mark = folder / f".processes{LEFT_BY_A_KILL}{uuid.uuid4().hex}"
        mark.touch()
        return mine, mark.name

    theirs, mark = broadcast_from_first(first)
    try:
        different = list(differences(theirs, mine, "it is {} in the first process, {} in this one"))
        if different:
            raise KestrelError(
                f"process {rank()} was started with other settings or libraries than the first; give all machines the "
                "same\n  " + "\n  ".join(different)
            )
        if not _appears(folder / mark):
            raise KestrelError(
                f"process {rank()} does not see what the first one writes into run_dir {folder}; put run_dir on a file "
                "system that all machines share"
            )
        all_reduce_max(0)  # until all have looked
    finally:
        if is_first():
            (folder / mark).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
