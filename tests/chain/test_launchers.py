"""Mistakes with launchers are reported once and plainly, and launchers leave the scripts' options to the scripts."""

from __future__ import annotations

import pytest
from launching import ACCELERATE, RUN, begin, end, free_port
from scripts import ROOT

from benchmarks.profiles import script
from kestrel.config.keys import all_keys
from kestrel.runtime.run_folder import locked_run_folder


@pytest.mark.parametrize("differing", ["settings", "folder"])
def test_machines_with_different_settings_are_refused_on_both(prepared, tmp_path, differing):
    """Two launchers stand for two machines; the second has other settings, or the same run_dir is another folder there."""
    script = tmp_path / "meet.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from kestrel.runtime import rendezvous\nfrom kestrel.runtime.command_line import run_script\n"
        "rendezvous._VISIBLE_WITHIN = 1.0\n"
        "steps = lambda settings, options: print('met', rendezvous.join_processes(settings))\n"
        "sys.exit(run_script('meet.py', '', steps, together=True))\n"
    )
    launcher = [*RUN, "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", free_port(), "--node_rank"]
    command = [str(script), *prepared.arguments("--run_dir", "here")]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "here").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    if differing == "settings":
        first = begin(*command, launcher=[*launcher, "0"], cwd=tmp_path)
        second = begin(*command, "--training.learning_rate", "5e-3", launcher=[*launcher, "1"], cwd=tmp_path)
        wanted = "training.learning_rate: 0.01 in the first process, 0.005 in this one"
    else:
        first, second = (begin(*command, launcher=[*launcher, str(n)], cwd=folders[n]) for n in (0, 1))
        wanted = "process 1 does not see what the first one writes to run_dir here; use a folder on a file system"
    for launched, says in ((second, "meet.py: process 1 "), (first, "meet.py: on ")):
        status, out, err = end(launched)
        assert status != 0 and "met" not in out
        assert err.count("meet.py: ") == err.count(says) == err.count(wanted) == 1, err
    assert not list(tmp_path.rglob(".processes*"))


def test_only_the_first_process_prints_uses_the_folder_and_runs_other_scripts(prepared, tmp_path, monkeypatch, capsys):
    import train

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    arguments = [*prepared.arguments(), "--run_dir", str(tmp_path / "run")]
    for name in ("preprocess", "evaluate"):  # by path: a library is named evaluate too
        assert script(name).main(arguments) == 0
    assert train.main([*arguments, "--print-config"]) == 0
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert capsys.readouterr() == ("", "")
    with locked_run_folder(str(tmp_path / "run"), ""):
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["preprocess", "train", "generate", "evaluate", "publish", "chat"])
def test_launchers_leave_the_scripts_options_to_the_script(script):
    """Both read their options with argparse, which takes or refuses what looks like an abbreviation of one."""
    import importlib

    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    options = [name for name, _ in getattr(importlib.import_module(script), "OPTIONS", [])]
    given = ["--config", "c.yaml", "--debug", "--print-config", "--help", *options]
    given += [f"--{key}" for key in all_keys()]
    for parser in (get_args_parser(), launch_command_parser()):
        assert parser.parse_args(["train.py", *given]).training_script_args == given


def test_a_warning_where_accelerate_starts_one_process_instead_of_two(prepared, tmp_path):
    """If this fails, accelerate (1.15) starts several processes on CPUs too, and `launch_warning` can go."""
    launch = [*ACCELERATE, "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = ["train.py", *prepared.arguments(), "--run_dir", str(tmp_path / "run")]
    status, _, err = end(begin(*command, launcher=launch))
    assert status != 0 and "no dataset in" in err and err.count("torchrun --nproc_per_node N") == 1
