"""Several processes of one run, as torchrun and accelerate start them: who speaks, who decides, and how all of them end.

A launcher gives each process its number in RANK and their count in WORLD_SIZE. The first one, number 0, writes, prints
and holds the folder's lock for all. What one process alone finds on disk it tells the others, so that all do the same.
Without a launcher there is one process, and everything here costs nothing. torch is imported only where it is needed.
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

_STORE_PATIENCE = timedelta(seconds=10)


def world_size() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """While the block runs, what the others print goes nowhere."""
    if is_first():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def leave() -> None:
    """Ends what `join` began. After a failure it is not called: it might wait for a process that is gone."""
    torch = sys.modules.get("torch")
    if world_size() > 1 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast_from_first(decide: Callable[[], T]) -> T:
    """What the first process finds, in all of them. The others do not look, and wait until it has."""
    if world_size() == 1:
        return decide()
    import torch

    found: list[T | None] = [decide() if is_first() else None]
    torch.distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]  # type: ignore[return-value]


def all_reduce_max(value: int) -> int:
    """The greatest of the processes' values."""
    if world_size() == 1:
        return value
    import torch

    values = torch.tensor(value, dtype=torch.int64)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return int(values)


def all_reduce_min(value: int) -> int:
    """The least of the processes' values."""
    return -all_reduce_max(-value)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Gives each parameter the mean of the processes' gradients, in one exchange; none counts as zero.

    Args:
        parameters: trained; the same in each process, and of one dtype.
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
    """What each process has to say, by its number; in the first one. The others get an empty list."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[T | None] | None = [None] * world_size() if is_first() else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []  # type: ignore[return-value]


# -- failures ----------------------------------------------------------------------------------------------------------


def failure_to_tell(message: str) -> str | None:
    """What this process has to tell of the failure that ends it.

    The first that fails ends the run. The others fail in its wake and have nothing to tell; but on each other machine one
    of them repeats what the first said, for who watches that machine's terminal.

    Args:
        message: its own failure's.
    """
    if world_size() == 1:
        return message
    machine = os.environ.get("GROUP_RANK", "0")
    try:
        store = _store()
        if store.add(_failure(), 1) == 1:
            store.set(f"{_failure()}/message", json.dumps([machine, f"on {socket.gethostname()}: {message}"]))
            return message
        if os.environ.get("LOCAL_RANK") != "0":
            return None
        elsewhere, said = json.loads(store.get(f"{_failure()}/message"))
        return said if elsewhere != machine else None
    except Exception:  # noqa: BLE001  nobody to ask: rather two messages than none
        return message


def has_failed() -> bool:
    """Whether a process of this run has failed."""
    if world_size() == 1:
        return False
    try:
        return _store().add(_failure(), 0) > 0
    except Exception:  # noqa: BLE001  nobody to ask
        return False


def is_abandoned(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    said = str(error)
    gone = ("onnection closed by peer", "onnection reset by peer", "onnection refused", "roken pipe")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(words in said for words in gone)


def _failure() -> str:
    return f"kestrel/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    """The launcher's own record, which outlives its processes; torchrun keeps one, and accelerate by way of torchrun."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=_STORE_PATIENCE)
