"""The pages are true: the commands of docs/tasks.md, those of other pages, and the notebook run, on fewer dialogues and
steps than the quickstart's."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from scripts import commands_in, script

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line for block in BLOCKS for line in commands_in(block) if re.match(r"python \w+\.py .*quickstart\.yaml", line)
]
# Of the other pages and for other configs, what needs no Hub, no model and no file that is not there; tests/chain,
# tests/publishing, tests/evaluation and test_docs.py run the others. Run after the page's own, with its config.
ELSEWHERE = r"you/.*persona(?!.*--dry-run)|my-|mine\.jsonl|wandb|mistral|falcon-7b-original|roberta|\.csv|runs/a |share-250|--show|other_personas"
OTHERS = sorted(
    {
        re.sub(r"configs/[\w.-]+\.yaml", "configs/quickstart.yaml", line)
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for line in commands_in(block)
        if re.match(r"python \w+\.py .*--config", line) and not re.search(ELSEWHERE, line)
    }
    - {*COMMANDS},
    reverse=True,  # train, publish, generate, evaluate: publish.py wants the evaluation of the newest answers
)


def test_most_commands_are_for_the_quickstart() -> None:
    assert len(COMMANDS) >= 15 and len({command.split()[1] for command in COMMANDS}) == 6
    assert len(OTHERS) >= 5


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: one that looks like the repository, with a quickstart of two steps."""
    config = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    changes = {
        r"(source: .*)": r"\1\n  max_dialogues: 8",
        r"evaluations: 4 ": "evaluations: 2 ",
        r"(max_new_tokens: 32 .*)": r"\1\n  max_dialogues: 4",
    }
    for pattern, replacement in changes.items():
        config, found = re.subn(pattern, replacement, config)
        assert found == 1, pattern
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(config + "hub:\n  base_model: x/toy\n", encoding="utf-8")
    (tmp_path / "quickstart").symlink_to(ROOT / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_the_order_of_the_page(small: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    for command in [*COMMANDS, *OTHERS]:
        # tests/chat has the page; of the loop, one turn is enough.
        if "--web" not in command and not re.search("runs/rate(?!1e-3)", command):
            assert run(command) == 0, (command, capsys.readouterr().err)
    names = ("quickstart", "longer", "second", "mine", "r4", "toy-seed2")
    assert all((small / "runs" / name).is_dir() for name in names)
    assert (small / "runs" / "quickstart" / "comparison" / "report.html").is_file()
    assert (small / "merged" / "config.json").is_file()


def run(command: str) -> int:
    _, name, *argv = shlex.split(command)
    status: int = script(name.removesuffix(".py")).main(argv)
    return status


def cells_of_the_notebook() -> list[str]:
    """Its code as a kernel would run it; `git clone` and `pip` are left out, and so is what displays a picture."""
    notebook = json.loads((ROOT / "docs" / "falcon-7b-t4.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    run_here = [re.sub(r"!python (.*)", r'assert run(f"python \1") == 0', cell) for cell in cells]
    return [re.sub(r"!(git|pip) .*|from IPython.*", "pass", cell) for cell in run_here]


def test_the_notebook_says_what_a_session_lacks(tmp_path: Path, monkeypatch, capsys) -> None:
    """No Drive, no GPU, no repository at the address, cells that run twice, and losses before there are any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    first, mount, clone, _, _, losses, *_ = cells_of_the_notebook()
    variables: dict[str, Any] = {}
    exec(first, variables)  # noqa: S102
    with pytest.raises(SystemExit, match="Drive is not mounted"):
        exec(mount, variables)  # noqa: S102
    variables["RUN"] = str(tmp_path / "run")
    with pytest.raises(SystemExit, match="no GPU here"):
        exec(mount, variables)  # noqa: S102
    with pytest.raises(SystemExit, match="set SOURCE"):
        exec(clone, variables)  # noqa: S102
    (tmp_path / "kestrel-source").mkdir()
    (tmp_path / "kestrel-source" / "train.py").touch()
    for _again in range(2):
        exec(clone, variables)  # noqa: S102
    assert Path.cwd() == tmp_path / "kestrel-source"
    exec(losses, variables)  # noqa: S102
    assert "no plot of the losses yet" in capsys.readouterr().out


def test_the_notebook_runs_and_goes_on_after_a_lost_session(small: Path, monkeypatch, capsys) -> None:
    assert (ROOT / "configs" / "falcon-7b-t4.yaml").is_file()
    (small / "kestrel-source").symlink_to(small)
    (small / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", str(small), prepend=os.pathsep)
    shown: list[Any] = []
    for _session in (1, 2):
        variables: dict[str, Any] = {"run": run, "Image": Path, "display": shown.append}
        os.chdir(small)
        for number, cell in enumerate(cells_of_the_notebook()):
            exec(cell, variables)  # noqa: S102
            if number == 0:
                variables |= {"CONFIG": "configs/quickstart.yaml", "RUN": str(small / "My Drive" / "run")}
    assert len(shown) == 2 and all(picture.is_file() for picture in shown)
    assert capsys.readouterr().out.count("best validation loss") == 2
