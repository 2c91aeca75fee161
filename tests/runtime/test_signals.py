"""A signal at an awkward moment, a reader that has gone, a terminal with another encoding."""

from __future__ import annotations

import signal
import subprocess
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
from children import python

from kestrel.runtime.command_line import run_script
from kestrel.runtime.signals import INTERRUPTED
from kestrel.training import progress


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\ndata:\n  source: s\nmodel:\n  name: m\n")
    return str(path)


def run_in_a_process(config: str, step: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of one step, for which `os`, `signal`, `sys` and `folder_atomically` are imported."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom kestrel.runtime.atomic import folder_atomically\n"
        "from kestrel.runtime.command_line import run_script\n"
        f"def steps(settings, options):\n{textwrap.indent(textwrap.dedent(step), '    ')}\n"
        f"raise SystemExit(run_script('x.py', 'X.', steps, ['--config', {config!r}]))"
    )
    return python("-c", code, **environment)


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
def test_a_signal_ends_a_script_at_any_moment(config: str, where: str, number: signal.Signals) -> None:
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
    assert run_script("script.py", "", lambda *_: None, ["--config", config]) == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_terminal_of_another_encoding_ends_no_run(config: str) -> None:
    done = run_in_a_process(config, "print('\\u2013')", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr


def test_a_signal_in_the_middle_of_a_print_stops_training_after_the_step() -> None:
    code = """
        import os, signal, sys
        from kestrel.training.progress import StopOnSignal
        from kestrel.runtime.output import _Pipe, prepare_output
        from kestrel.runtime.signals import on_signals
        def trace(frame, event, argument):
            if frame.f_code is _Pipe.write.__code__:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGTERM)
        prepare_output()
        stop = StopOnSignal()
        with on_signals(stop.on_signal):
            sys.settrace(trace)
            print('step 4', flush=True)
        print(stop.received)
    """
    done = python("-c", textwrap.dedent(code))
    assert (done.stdout, done.returncode) == ("step 4\n15\n", 0), done.stderr
    assert "\nstopping after the first step and a checkpoint; once more to stop at once" in done.stderr


def test_a_signal_that_the_launcher_passes_on_does_not_count_twice(monkeypatch) -> None:
    """As where a batch system signals all processes of a job, torchrun and its workers."""
    monkeypatch.setattr(progress, "exit_now", lambda number, message: (_ for _ in ()).throw(SystemExit(number)))
    for launched in (True, False):
        stop = progress.StopOnSignal()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1") if launched else monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        stop.on_signal(signal.SIGTERM, None)
        with nullcontext() if launched else pytest.raises(SystemExit):
            stop.on_signal(signal.SIGTERM, None)
        assert stop.received == signal.SIGTERM


def test_ctrl_c_is_quiet_while_a_script_imports_and_leaves_other_programs_alone(tmp_path: Path) -> None:
    """While the interpreter itself starts, Python prints a traceback; a module that is imported first shows the moment."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    for name in ("preprocess.py", "train.py", "generate.py", "evaluate.py", "publish.py", "chat.py"):
        done = python(name, "--help", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{INTERRUPTED}\n"), name
    done = python("-c", "import signal, train; print(signal.getsignal(2) is signal.default_int_handler)")
    assert done.stdout == "True\n", done.stderr
