"""Several processes of one run, as torchrun and accelerate start them: who prints, who decides, how all of them end.

The launcher sets RANK and WORLD_SIZE. The first process, rank 0, writes, prints and holds the folder's lock for all, and
broadcasts what it reads from disk. torch is imported only where it is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))  # a number: scripts have asked `launch_problem` before


def launch_problem() -> str | None:
    """What is wrong where the launchers' variables do not belong together, as those that another shell left; else None."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    advice = "start several processes with torchrun; for a single one: unset WORLD_SIZE RANK LOCAL_RANK"
    for name, value in given.items():
        if name != "MASTER_ADDR" and not (value.isascii() and value.isdecimal()):
            return f"the environment has {name}={value!r}, which is no number; {advice}"
    needs_all = world_size() > 1 or "LOCAL_RANK" in given
    missing = [name for name in names if name not in given and name != "LOCAL_RANK"] if needs_all else []
    if missing or rank() >= world_size():
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        return f"the environment has {found}{f' without {missing[0]}' if missing else ''}, perhaps left by another run; {advice}"
    return None


def started_by_hand() -> bool:
    """Whether several processes were not started by torchrun or accelerate, or only the variables say that there are any."""
    return world_size() > 1 and "TORCHELASTIC_RUN_ID" not in os.environ


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def launch_warning() -> str | None:
    """A warning if the launcher started one process instead of several; None otherwise.

    accelerate (1.15) starts one process on CPUs whatever its --num_processes; if that is above 1, it sets MASTER_PORT
    but not WORLD_SIZE. tests/chain/test_launchers.py fails when that changes.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        return "accelerate started one process instead of several, as it does on CPUs; use torchrun --nproc_per_node N"
    return None


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Discards what the other processes print while the block runs."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield


def leave_process_group() -> None:
    """Ends what `join_processes` began. Not for use after a failure: it might wait for a process that is gone."""
    torch = sys.modules.get("torch")
    if world_size() > 1 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast_from_first(decide: Callable[[], T]) -> T:
    """The first process's `decide()`, in all of them. The others do not call it, and wait."""
    if world_size() == 1:
        return decide()
    import torch

    values: list[T | None] = [decide() if is_first() else None]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]  # type: ignore[return-value]


def all_reduce_max(value: int) -> int:
    """The greatest value of all processes."""
    if world_size() == 1:
        return value
    import torch

    values = torch.tensor(value, dtype=torch.int64)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return int(values)


def all_reduce_min(value: int) -> int:
    """The least value of all processes."""
    return -all_reduce_max(-value)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replaces each parameter's gradient by its mean over all processes, in one exchange; None counts as zero.

    All processes pass the same parameters, of one dtype.
    """
    if world_size() == 1:
        return
    import torch

    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world_size())
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def gather_to_first(value: T) -> list[T]:
    """Each process's value, by rank, in the first process; the others get an empty list."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[T | None] | None = [None] * world_size() if is_first() else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []  # type: ignore[return-value]


# -- failures ----------------------------------------------------------------------------------------------------------


def failure_to_report(message: str) -> str | None:
    """What this process should print about the failure that ends it, of which `message` is its own description.

    The first process to fail ends the run, and the others then fail too, with nothing to add. Only on each other machine
    one of them repeats the first message, for whoever watches that machine's terminal.
    """
    if world_size() == 1:
        return message
    machine = os.environ.get("GROUP_RANK", "0")
    mine = [rank(), machine, f"on {socket.gethostname()}: {message}"]
    try:
        first = json.loads(_launchers_store().compare_set(_failure_key(), "", json.dumps(mine)))
    except Exception:  # noqa: BLE001  without the store, two messages are better than none
        return message
    if first == mine:
        return message
    return first[2] if first[1] != machine and os.environ.get("LOCAL_RANK") == "0" else None


def any_failed() -> bool:
    """Whether a process of this run has reported a failure."""
    if world_size() == 1:
        return False
    try:
        return bool(_launchers_store().check([_failure_key()]))
    except Exception:  # noqa: BLE001  the store is gone
        return False


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error means that another process of the run is gone."""
    causes = ("onnection closed by peer", "onnection reset by peer", "onnection refused", "roken pipe")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(cause in str(error) for cause in causes)


def _failure_key() -> str:
    return f"kestrel/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _launchers_store() -> Any:
    """The store of torchrun, and of accelerate, which uses it; it outlives the processes of the run.

    torchrun's own `elastic.multiprocessing.errors.record` prints a traceback for every process, and on machines other
    than the one that failed it names a lost connection as the cause.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
