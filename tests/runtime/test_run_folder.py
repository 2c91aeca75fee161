"""Two runs never share a folder, on whatever machines, and a dead process does not hold it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from children import WAIT, child, kill, python

from kestrel.errors import KestrelError
from kestrel.runtime import run_folder
from kestrel.runtime.run_folder import locked_run_folder

HOLD = f"with locked_run_folder(sys.argv[1], ''): {WAIT}"


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    first = child(HOLD, str(tmp_path))
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: {tmp_path}\ndata: {{source: s}}\nmodel: {{name: m}}\n")
    left = tmp_path / ".dataset.incomplete-1"
    left.mkdir()
    second = python("preprocess.py", "--config", str(config))
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert f"is in use by process {first.pid} on " in second.stderr and "another run_dir" in second.stderr
    assert left.exists(), "the second must not clear what the first is writing"
    kill(first)
    began = time.monotonic()
    with locked_run_folder(str(tmp_path), "a: 1\n") as folder:
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    assert time.monotonic() - began < 1 and not left.exists()


def test_a_process_that_the_holder_forked_does_not_hold_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom kestrel.runtime.run_folder import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n"
        "    if os.fork() == 0:\n        os.close(1); os.close(2); time.sleep(30); os._exit(0)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert python("-c", code).returncode == -9
    with run_folder.locked(tmp_path):
        pass


def test_processes_of_one_run_share_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked_run_folder(str(tmp_path), "a: 1\n"):
        monkeypatch.setenv("RANK", "1")
        with locked_run_folder(str(tmp_path), "a: 2\n"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(KestrelError, match="in use"), locked_run_folder(str(tmp_path), "a: 3\n"):
            pass
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "TOUCH_EVERY", 0.05)
    monkeypatch.setattr(run_folder, "STALE_AFTER", 1.0)


@pytest.fixture(params=[-1, 0, 1], ids=["a clock behind", "the same clock", "a clock ahead"])
def days(request: pytest.FixtureRequest) -> int:
    """By which the other machine's clock, or this one's after a jump, is wrong."""
    return int(request.param)


def held_elsewhere(folder: Path, days: int) -> Path:
    """The lock as a process of another machine wrote it."""
    path = folder / ".lock"
    path.write_text("process 7 on a distant machine since 2026-01-01 00:00:00 +0000\nits boot id\n")
    os.utime(path, (time.time() + days * 86400,) * 2)
    return path


def test_a_lock_of_another_machine_is_kept_while_its_holder_touches_it(
    tmp_path: Path, impatient: None, days: int
) -> None:
    path, ended = held_elsewhere(tmp_path, days), threading.Event()
    thread = threading.Thread(target=run_folder._touch_until, args=(path, ended))
    thread.start()
    try:
        refused = pytest.raises(KestrelError, match="in use by process 7 on a distant machine since 2026")
        with refused, locked_run_folder(str(tmp_path), "a: 1\n"):
            pass
    finally:
        ended.set()
        thread.join()
    assert "process 7" in path.read_text() and not (tmp_path / "config.yaml").exists()


def test_a_lock_of_another_machine_that_is_not_touched_is_stale(
    tmp_path: Path, impatient: None, capsys: pytest.CaptureFixture[str], days: int
) -> None:
    path = held_elsewhere(tmp_path, days)
    with locked_run_folder(str(tmp_path), "a: 1\n"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    said = capsys.readouterr().err
    assert "last used by process 7 on a distant machine" in said and "no sign of it" in said
    assert path.read_text() == "", "released"


def test_the_holder_touches_its_lock(tmp_path: Path, impatient: None) -> None:
    with locked_run_folder(str(tmp_path), "a: 1\n"):
        assert run_folder._is_touched(tmp_path / ".lock")
    assert not run_folder._is_touched(tmp_path / ".lock")


def test_a_file_system_without_locks(tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with locked_run_folder(str(tmp_path), "a: 1\n"):
        refused = pytest.raises(KestrelError, match=f"in use by process {os.getpid()}")
        with refused, locked_run_folder(str(tmp_path), "a: 2\n"):
            pass
    with locked_run_folder(str(tmp_path), "a: 3\n"):
        pass
