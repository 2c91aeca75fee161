"""The memory that this machine, or the container that limits this process, has."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_MUCH = 3 * 2**29  # bytes
_PAGE = os.sysconf("SC_PAGE_SIZE")
# The files of both versions of cgroups: the limit, and what is in use, below the folder of version 2 or of version 1.
_FILES = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))


def memory_limit() -> int:
    """Bytes that the processes here may use: of the machine, or of the tightest limit of a container or service."""
    return min([_PAGE * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _limits())])


def memory_available() -> int:
    """Bytes that this process could still take."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", (_PROC / "meminfo").read_text())
    except OSError:
        found = None  # not Linux
    free = int(found[1]) * 1024 if found else _PAGE * os.sysconf("SC_PHYS_PAGES")
    return min([free, *(max(0, limit - used) for limit, used in _limits())])


def memory_used() -> int:
    """Bytes that this process has in memory now; its peak so far where that cannot be known."""
    try:
        return int((_PROC / "self" / "statm").read_text().split()[1]) * _PAGE
    except OSError:
        return memory_peak()


def release_free_memory() -> None:
    """Gives the system back what this process has freed, where that may be much.

    glibc keeps freed blocks, and those of one training step rarely fit the next one: on a CPU, the memory of a 135M model grew
    by half in five steps without this, and stayed with it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and memory_used() > _MUCH:
        trim(0)


def memory_peak() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def _limits() -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each group of processes that this one is in; without the cache of files, which gives way."""
    found = []
    for version, limit_name, used_name in _FILES:
        for group in _groups(version):
            try:
                limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
            if limit.isdecimal():  # else "max"
                found.append((int(limit), max(0, int(used) - cached)))
    return found


def _groups(version: str) -> list[Path]:
    """The folders of this process's group and of those that contain it; in a container, the outermost is its own."""
    top = _CGROUPS / version
    try:
        lines = [line.split(":", 2) for line in (_PROC / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    own = next((path for _, controllers, path in lines if controllers == version), "/")
    folder = top / own.strip("/")
    return [group for group in (folder, *folder.parents) if group == top or top in group.parents]
