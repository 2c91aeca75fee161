"""A signal at an awkward moment, a reader that has gone, a terminal with another encoding."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from kestrel.runtime.command_line import run_script
from kestrel.runtime.signals import INTERRUPTED

ROOT = Path(__file__).resolve().parents[2]


def run(steps: Callable[..., None], *argv: str) -> int:
    return run_script("script.py", "What it does.\n", steps, list(argv))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\ndata:\n  source: s\nmodel:\n  name: m\n")
    return str(path)


def run_in_a_process(config: str, step: str, name: str = "x.py") -> subprocess.CompletedProcess[str]:
    """A script of one step, for which `os`, `signal`, `sys` and `folder_atomically` are imported."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom kestrel.runtime.atomic import folder_atomically\n"
        "from kestrel.runtime.command_line import run_script\n"
        f"def steps(settings, options):\n{textwrap.indent(textwrap.dedent(step), '    ')}\n"
        f"raise SystemExit(run_script({name!r}, 'X.', steps, ['--config', {config!r}]))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


SIGNALLED = {
    "plainly": "os.kill(os.getpid(), {number})",
    "in a finalizer": """
        class Finalized:
            def __del__(self):
                os.kill(os.getpid(), {number})
        Finalized()
    """,
    "where a library turns exceptions into its own": """
        try:
            os.kill(os.getpid(), {number})
        except BaseException:
            raise ValueError("Invalid affine transformation matrix") from None
    """,
    "in an import": """
        sys.path.insert(0, settings.run_dir)
        Path(settings.run_dir, "slow.py").write_text("import os; os.kill(os.getpid(), {number})")
        import slow
    """,
}


@pytest.mark.parametrize("where", SIGNALLED)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_wherever_it_comes(config: str, where: str, number: signal.Signals) -> None:
    done = run_in_a_process(config, "print('begun')\n" + textwrap.dedent(SIGNALLED[where].format(number=int(number))))
    assert (done.returncode, done.stdout) == (128 + number, "begun\n")
    assert done.stderr == f"{INTERRUPTED}\n"


def test_a_signal_leaves_nothing_unfinished_and_releases_the_folder(config: str, tmp_path: Path) -> None:
    done = run_in_a_process(
        config,
        """
        with folder_atomically(Path(settings.run_dir) / "dataset") as folder:
            (folder / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
        """,
    )
    assert done.returncode == 143, done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_the_handlers_from_before_come_back(config: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda *_: None, "--config", config) == 0
    assert signal.getsignal(signal.SIGTERM) == before


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


def test_a_terminal_of_another_encoding_ends_no_run(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONUTF8", "0")
    done = run_in_a_process(config, "print('\\u2013')")
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr


def test_a_signal_in_the_middle_of_a_print_stops_training_after_the_step() -> None:
    code = (
        "import os, signal, sys\n"
        "from kestrel.training.callbacks import StopOnSignal\n"
        "from kestrel.runtime.signals import _Pipe, prepare_output\n"
        "def trace(frame, event, argument):\n"
        "    if frame.f_code is _Pipe.write.__code__:\n"
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
    assert done.stderr.endswith("\nstopping after this step and saving a checkpoint; once more to stop at once\n")
