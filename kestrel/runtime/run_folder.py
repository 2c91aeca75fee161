"""One run, one folder: who holds it, on which machine, and whether that process still lives."""

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

from kestrel.errors import KestrelError
from kestrel.runtime.atomic import clear_leftovers, write_atomically
from kestrel.runtime.distributed import is_first

LOCK = ".lock"
BEAT = 5.0  # seconds between two signs of life of the process that holds a folder
PATIENCE = 20.0  # seconds without one after which that process is taken for dead
_held: set[int] = set()  # files that are locked
_OWNER = re.compile(r"(?P<owner>process \d+ on .+ since .+)\n(?P<kernel>.*)\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder while the block runs.

    Among processes of one kernel, in whatever containers, the lock is the kernel's and ends with its process however
    that dies. Network file systems may keep such locks to each machine. So the file also says who holds it and is
    touched every few seconds, and where another machine's process never released it, the file is watched for a while.

    Raises:
        KestrelError: another process holds the folder; naming it.
    """
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8", errors="replace") as lock:
        kernels = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse(folder, _owner(path)[0] or "another process")
        except OSError:  # some network file systems have no locks
            kernels = False
        owner, kernel = _owner(path)
        if owner and not (kernels and kernel == _kernel()):
            print(f"{folder} was last held by {owner}; is it alive?", file=sys.stderr)
            if _shows_life(path):
                _refuse(folder, owner)
            print("no sign of life: going on", file=sys.stderr)
        lock.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n{_kernel()}\n")
        lock.flush()
        released = threading.Event()
        threading.Thread(target=_beat, args=(path, released), daemon=True).start()
        _held.add(lock.fileno())
        try:
            yield
        finally:
            released.set()
            lock.truncate(0)
            _held.discard(lock.fileno())


def _let_go() -> None:
    """A process that this one forked does not hold its folders, nor keep them when this one dies."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _refuse(folder: Path, owner: str) -> None:
    raise KestrelError(f"{folder} is in use by {owner}; wait for it, or give this run another run_dir")


def _owner(path: Path) -> tuple[str, str]:
    """Who holds a lock or died with it, in words, and on which kernel; both empty if it was released."""
    found = _OWNER.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return (found["owner"], found["kernel"]) if found else ("", "")


def _kernel() -> str:
    """What processes that share the kernel's locks have in common and no others; the host's name where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _beat(path: Path, released: threading.Event) -> None:
    while not released.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _shows_life(path: Path) -> bool:
    """Whether the file is touched within PATIENCE. Only its own times are compared: clocks of machines differ."""
    until = time.monotonic() + PATIENCE
    first = None
    while time.monotonic() < until:
        with open(path, encoding="utf-8") as file:  # opening it makes a network file system look anew
            touched = os.fstat(file.fileno()).st_mtime_ns
        first = first or touched
        if touched != first:
            return True
        time.sleep(BEAT / 10)
    return False


@contextmanager
def locked_run_folder(run_dir: str, settings: str) -> Iterator[Path]:
    """The run's folder, locked for this process; when it is left, the resolved settings stand in config.yaml.

    Of several processes of one run, the first holds the lock for all and makes the folder.

    Raises:
        KestrelError: another process holds the folder, or there cannot be one.
    """
    folder = Path(run_dir)
    if not is_first():
        yield folder
        return
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise KestrelError(f"run_dir {folder} is or lies below a file; give this run another run_dir") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOENT):
            said = f"run_dir {str(folder)[:200]} cannot be made ({error.strerror}); give this run another run_dir"
            raise KestrelError(said) from None
        raise
    with locked(folder):
        clear_leftovers(folder)
        accepted = False
        try:
            yield folder
            accepted = True
        except KeyboardInterrupt:
            accepted = True
            raise
        finally:
            # Settings that were refused are not what the folder was made with.
            if accepted:
                with write_atomically(folder / "config.yaml") as file:
                    file.write(settings)
            elif is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
