"""What README.md and docs/ tell a user to type is accepted, and what they quote is current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kestrel.publishing.merge import serving

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "quickstart" / "README.md",
]


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    return found


COMMANDS = _commands()


def test_the_two_commands_are_there() -> None:
    typed = {command for _, command in COMMANDS}
    assert {"make quickstart", "make test"} <= typed


@pytest.mark.parametrize("command", sorted({c for _, c in COMMANDS if c.startswith("make ")}))
def test_make_targets_exist(command: str) -> None:
    done = subprocess.run(
        ["make", "-n", *shlex.split(command, comments=True)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# A script of ours, alone or in several processes; whatever the launcher is told is the launcher's business.
SCRIPT = r"(?:python|torchrun\b.*?|accelerate launch\b.*?) (\w+\.py --config.*)"


@pytest.mark.parametrize("command", sorted({m[1] for _, c in COMMANDS if (m := re.match(SCRIPT, c))}))
def test_commands_of_scripts_are_valid(command: str) -> None:
    arguments = shlex.split(command, comments=True)
    done = subprocess.run(
        [sys.executable, *arguments, "--print-config"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "run_dir:" in done.stdout


TOOLS = "quickstart|benchmarks|docs|tools"
SERVING = serving("merged", "bfloat16").splitlines()


def test_every_command_is_checked_by_some_test() -> None:
    known = re.compile(rf"make |pip install -r requirements|{SCRIPT}|python ({TOOLS})/\w+\.py")
    assert not [command for _, command in COMMANDS if not known.match(command) and command not in SERVING]


def test_other_engines_are_served_as_the_merged_models_own_page_says() -> None:
    """They cannot be run here; the page says which of them were tried, and by what command again."""
    assert {command for _, command in COMMANDS} >= set(SERVING)
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    for engine in ("transformers", "llama.cpp", "vLLM", "Text Generation Inference"):
        assert re.search(rf"^\| {re.escape(engine)} \| (?:no; |in |with )", page, re.MULTILINE), engine


@pytest.mark.parametrize("command", sorted({c for _, c in COMMANDS if re.match(rf"python ({TOOLS})/", c)}))
def test_tools_exist(command: str) -> None:
    tool = shlex.split(command, comments=True)[1]
    done = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_table_is_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import fill_readme
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill_readme.fill(text, "settings", fill_readme.settings_table()) == text, "run make readme"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
