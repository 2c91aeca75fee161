"""A setting that a script or a source does not use is refused or named, never ignored in silence."""

from __future__ import annotations

import generate
import preprocess
import publish
import train


def test_an_option_for_another_script_is_refused_or_named(prepared, tmp_path, capsys) -> None:
    copied = [*prepared.arguments("--run_dir", str(tmp_path / "run"))]
    assert train.main([*copied, "--model.adapter", "a/b"]) == 2
    assert "--model.adapter: train.py would ignore it" in capsys.readouterr().err
    assert publish.main([*copied, "--merge", str(tmp_path / "m"), "--hub.repo_id", "a/b"]) == 1
    assert "note: --merge sends nothing; hub.repo_id is not used\n" in capsys.readouterr().err
    options = ["--data.self", "Ann", "--data.persona", "i am ana .", "--model.adapter", "a/b", "--evaluation.stemmer"]
    assert preprocess.main([*copied, *options, "--hub.private", "no"]) == 0
    said = capsys.readouterr()
    assert "\ndata.self was not used: it is for whatsapp, telegram, discord, messenger, and the source is " in said.out
    assert "\ndata.persona was not used: each dialogue has a persona of its own\n" in said.out
    assert "\nnext: python generate.py " in said.out, "train.py refuses model.adapter"
    for key, user in ("model.adapter", "generate"), ("evaluation.stemmer", "evaluate"), ("hub.private", "publish"):
        assert f"note: --{key} is for {user}.py; preprocess.py does not use it\n" in said.err


def test_an_adapter_of_other_settings_is_named(evaluated, tmp_path, capsys) -> None:
    arguments = evaluated.copy_to(tmp_path / "run")
    for more, says in (["--training.learning_rate", "0.5"], "0.01, not 0.5"), (["--training.evaluations", "2"], ""):
        capsys.readouterr()
        assert generate.main([*arguments, *more]) == 0
        note = f"note: training.learning_rate: this run was trained with {says}; to train it again: python train.py --config"
        assert (note in capsys.readouterr().err) == bool(says)
