"""docs/tasks.md is true: its commands run one after the other, on fewer dialogues and steps than the quickstart's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from scripts import script

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for block in BLOCKS for line in block.splitlines() if re.match(r"python \w+\.py .*quickstart\.yaml", line)
]


def test_most_commands_are_for_the_quickstart() -> None:
    assert len(COMMANDS) >= 15 and len(set(re.findall(r"^python (\w+\.py)", PAGE, re.MULTILINE))) == 6


def test_the_commands_run_in_the_order_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    small = {
        r"epochs: 2 .*": "max_steps: 2",
        r"evaluations: 4 ": "evaluations: 2 ",
        r"(max_new_tokens: 32 .*)": r"\1\n  max_dialogues: 4",
    }
    for pattern, replacement in small.items():
        config, found = re.subn(pattern, replacement, config)
        assert found == 1, pattern
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "quickstart").symlink_to(ROOT / "quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    for command in COMMANDS:
        _, name, *argv = shlex.split(command)
        if "--web" not in argv:  # tests/chat has the page
            assert script(name.removesuffix(".py")).main(argv) == 0, (command, capsys.readouterr().err)
    assert all((tmp_path / "runs" / name).is_dir() for name in ("quickstart", "longer", "mine", "r4", "seed2"))
    assert (tmp_path / "runs" / "quickstart" / "comparison" / "report.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
