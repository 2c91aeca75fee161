"""One run per folder: which process holds it, on which machine, and whether that process is alive."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from kestrel.errors import KestrelError
from kestrel.runtime.atomic import clear_leftovers, write_atomically
from kestrel.runtime.distributed import is_first

LOCK = ".lock"
TOUCH_EVERY = 5.0  # seconds; the process that holds a folder touches its lock file
STALE_AFTER = 20.0  # seconds without a touch after which that process counts as dead
_locked: set[int] = set()  # descriptors of the lock files that this process holds
_HOLDER = re.compile(r"(?P<holder>process \d+ on .+ since .+)\n(?P<boot_id>.*)\n")


def link_dataset(run_dir: Path, other: Path) -> None:
    """Makes another run's data set this run's: a link, by which each script finds it.

    Raises:
        KestrelError: there is no data set, or this run has one of its own.
    """
    own = run_dir / "dataset"
    if not other.is_dir():
        raise KestrelError(f"data.dataset: there is no data set in {other}")
    if own.resolve() == other.resolve():
        return
    if own.is_symlink():
        own.unlink()
    elif own.exists():
        raise KestrelError(
            f"{own} is a data set of this run's own; delete it to use {other}, or leave out data.dataset"
        )
    own.symlink_to(os.path.relpath(other.resolve(), run_dir.resolve()))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder while the block runs.

    Processes under one kernel, containers included, use a lock of the kernel, which always ends with its process.
    Network file systems may keep such locks to each machine. So the file also names the holder, which touches it every
    few seconds; if a process on another machine never released it, the file is watched for a while.

    Raises:
        KestrelError: another process, which the message names, holds the folder.
    """
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8", errors="replace") as lock:
        has_kernel_lock = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse(folder, _holder(path)[0] or "another process")
        except OSError:  # some network file systems have no locks
            has_kernel_lock = False
        holder, boot_id = _holder(path)
        if holder and not (has_kernel_lock and boot_id == _boot_id()):
            print(f"{folder} was last used by {holder}; waiting {STALE_AFTER:.0f} s for a sign of it", file=sys.stderr)
            if _is_touched(path):
                _refuse(folder, holder)
            print("no sign of it: continuing", file=sys.stderr)
        lock.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        print(f"process {os.getpid()} on {socket.gethostname()} since {since}\n{_boot_id()}", file=lock, flush=True)
        released = threading.Event()
        threading.Thread(target=_touch_until, args=(path, released), daemon=True).start()
        _locked.add(lock.fileno())
        try:
            yield
        finally:
            released.set()
            lock.truncate(0)
            _locked.discard(lock.fileno())


def release_locks() -> None:
    """Empties the lock files, for a process that is about to end at once."""
    for descriptor in _locked:
        os.ftruncate(descriptor, 0)


def _close_in_child() -> None:
    """Closes a forked process's copies of the locks, with which it would keep them after its parent's end."""
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_close_in_child)


def _refuse(folder: Path, holder: str) -> NoReturn:
    raise KestrelError(f"{folder} is in use by {holder}; wait for it, or give this run another run_dir")


def _holder(path: Path) -> tuple[str, str]:
    """The process that holds a lock or ended without releasing it, and its boot id; both empty after a release."""
    match = _HOLDER.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return (match["holder"], match["boot_id"]) if match else ("", "")


def _boot_id() -> str:
    """An identifier that processes under one kernel share, and no others; the host's name where it is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _touch_until(path: Path, released: threading.Event) -> None:
    while not released.wait(TOUCH_EVERY):
        with contextlib.suppress(OSError):
            os.utime(path)


def _is_touched(path: Path) -> bool:
    """Whether the file is touched within STALE_AFTER. Only its own times are compared: clocks of machines differ."""
    until = time.monotonic() + STALE_AFTER
    touched: set[int] = set()
    while time.monotonic() < until and len(touched) < 2:
        with open(path, encoding="utf-8") as file:  # opening it makes a network file system look again
            touched.add(os.fstat(file.fileno()).st_mtime_ns)
        time.sleep(TOUCH_EVERY / 10)
    return len(touched) > 1


@contextmanager
def locked_run_folder(run_dir: str, settings: str) -> Iterator[Path]:
    """The run's folder, locked for this process. When the block ends, config.yaml has the resolved settings.

    Of several processes of one run, the first holds the lock for all and creates the folder.

    Raises:
        KestrelError: another process holds the folder, or it cannot be created.
    """
    folder = Path(run_dir)
    if not is_first():
        yield folder
        return
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOENT):
            raise
        reason = f"run_dir {str(folder)[:200]} cannot be created ({error.strerror})"
        raise KestrelError(f"{reason}; give this run another run_dir") from None
    with locked(folder):
        clear_leftovers(folder)
        try:
            yield folder
            accepted = True
        except BaseException as error:
            accepted = isinstance(error, KeyboardInterrupt)  # refused settings are not those of the folder
            if not accepted and is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
            raise
        finally:
            if accepted:
                with write_atomically(folder / "config.yaml") as file:
                    file.write(settings)
