"""A script's process: stopped by a signal at an awkward moment, read by nobody, on a terminal of another encoding."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from kestrel.runtime.command_line import run_script

ROOT = Path(__file__).resolve().parents[2]


def run(steps: Callable[..., None], *argv: str) -> int:
    return run_script("script.py", "What it does.\n", steps, list(argv))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\ndata:\n  source: s\nmodel:\n  name: m\n")
    return str(path)


def test_terminated(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda *_: os.kill(os.getpid(), signal.SIGTERM), "--config", config) == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_terminated_where_a_library_makes_an_error_of_its_own_of_it(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def library(settings: object, options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("Invalid affine transformation matrix") from None

    assert run(library, "--config", config) == 143
    assert "run the same command again to go on" in capsys.readouterr().err


class _Finalized:
    def __init__(self, last_act: Callable[[], None]):
        self.last_act = last_act

    def __del__(self) -> None:
        self.last_act()


def _in_a_finalizer(act: Callable[[], None]) -> None:
    _Finalized(act)


def _in_a_weak_reference(act: Callable[[], None]) -> None:
    referred = _Finalized(lambda: None)
    reference = weakref.ref(referred, lambda _: act())
    del referred
    assert reference() is None


@pytest.mark.parametrize("swallow", [_in_a_finalizer, _in_a_weak_reference])
@pytest.mark.parametrize("seconds_left", [10, 0])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_exception_python_swallows_stops_the_run_all_the_same(
    config: str,
    swallow: Callable[[Callable[[], None]], None],
    seconds_left: int,
    number: signal.Signals,
    status: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hook = sys.unraisablehook
    went_on = []

    def steps(settings: object, options: object) -> None:
        swallow(lambda: os.kill(os.getpid(), number))
        went_on.append("after the finalizer")
        for _ in range(100 * seconds_left):
            time.sleep(0.01)
            went_on.append("longer")

    began = time.monotonic()
    assert run(steps, "--config", config) == status
    assert went_on[0] == "after the finalizer" and time.monotonic() - began < 5
    said = capfd.readouterr().err
    assert "run the same command again to go on" in said and "Exception ignored" not in said
    assert sys.unraisablehook is hook
    time.sleep(0.1)  # nothing comes when nobody handles it: it would end pytest


def test_what_else_python_swallows_is_told_as_before(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    told = []
    before, sys.unraisablehook = sys.unraisablehook, lambda what: told.append(what.exc_type)
    try:
        assert run(lambda *_: _in_a_finalizer(lambda: 1 // 0), "--config", config) == 0  # type: ignore[arg-type]
    finally:
        sys.unraisablehook = before
    assert told == [ZeroDivisionError]


def test_a_reader_that_closes_early(config: str) -> None:
    done = subprocess.run(
        f"{sys.executable} preprocess.py --config {config} --print-config | true; exit ${{PIPESTATUS[0]}}",
        check=False,
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.returncode in (0, 1)


def test_a_terminal_of_another_encoding_ends_no_run(config: str) -> None:
    code = (
        "from kestrel.runtime.command_line import run_script\n"
        f"raise SystemExit(run_script('x.py', 'X.', lambda s, a: print('\\u2013'), ['--config', {config!r}]))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"?\n"), done.stderr


def test_a_signal_during_an_import_ends_the_process_plainly(config: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n", encoding="utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from kestrel.runtime.command_line import run_script\n"
        f"raise SystemExit(run_script('x.py', 'X.', lambda s, a: __import__('slow'), ['--config', {config!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr == "interrupted; run the same command again to go on\n"


def test_a_signal_in_the_middle_of_a_print_stops_training_after_the_step() -> None:
    code = (
        "import os, signal, sys\n"
        "from kestrel.training.callbacks import StopOnSignal\n"
        "from kestrel.runtime.signals import _Abandoned, prepare_output\n"
        "def trace(frame, event, argument):\n"
        "    if frame.f_code is _Abandoned.write.__code__:\n"
        "        sys.settrace(None)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "prepare_output()\n"
        "stop = StopOnSignal()\n"
        "with stop.listening():\n"
        "    sys.settrace(trace)\n"
        "    print('step 4', flush=True)\n"
        "print(stop.received)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("step 4\n15\n", 0), done.stderr
    assert done.stderr == "\nstopping after this step and saving a checkpoint; once more to stop at once\n"
