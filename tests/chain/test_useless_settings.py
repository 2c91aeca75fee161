"""A setting that a script or a source does not use is refused or named, never ignored in silence."""

from __future__ import annotations

import re

import preprocess
import publish
import train


def test_an_option_for_another_script_is_refused_or_named(prepared, tmp_path, capsys) -> None:
    copied = [*prepared.arguments("--run_dir", str(tmp_path / "run"))]
    adapter = ["--model.adapter", "a/b"]
    for script, key in ((preprocess, "evaluate.py and chat.py"), (train, "training.init_adapter")):
        assert script.main([*copied, *adapter]) == 2
        assert re.search(f"--model.adapter: .*{key}", capsys.readouterr().err)
    assert publish.main([*copied, "--merge", str(tmp_path / "m"), "--hub.repo_id", "a/b"]) == 2
    assert "--hub.repo_id: --merge sends nothing" in capsys.readouterr().err
    refused = ["--data.self", "Ann", "--evaluation.stemmer", "--hub.private", "no", "--hub.language", "de"]
    assert preprocess.main([*copied, *refused]) == 1
    said = capsys.readouterr().err
    assert "data.self is for whatsapp, telegram, discord, messenger, and " in said and "hub.language" not in said
    assert "note: --evaluation.stemmer is for evaluate.py; preprocess.py does not use it\n" in said
    assert "note: --hub.private is for publish.py; preprocess.py does not use it\n" in said
    assert preprocess.main([*copied, "--data.persona", "i am ana ."]) == 0
    assert "\ndata.persona was not used: each dialogue has a persona of its own\n" in capsys.readouterr().out
