"""README.md, CONTRIBUTING.md and docs/: commands are valid, keys and links exist, and generated blocks are current."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess

import pytest
from children import ROOT, python
from scripts import commands_in

from kestrel.config.keys import all_keys
from kestrel.publishing.merge import serving_commands

PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), ROOT / "quickstart" / "README.md")
}


def commands_of(text: str) -> list[str]:
    """The lines of its bash blocks; a line that ends in a backslash includes the next one."""
    return [command for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for command in commands_in(block)]


COMMANDS = sorted({command for text in PAGES.values() for command in commands_of(text)})
# One of our scripts, alone or in several processes. The launcher's own options are not checked.
SCRIPT = r"(?:python|torchrun\b.*?|accelerate launch\b.*?) (\w+\.py --(?:config|evaluation\.generations).*)"
TOOL = r"python ((?:quickstart|benchmarks|docs|tools)/\w+\.py)"
SERVING = serving_commands("merged", "bfloat16").splitlines()


def stdout_of(*arguments: str) -> str:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    subprocess.run(["make", "-n", *shlex.split(command, comments=True)[1:]], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize("command", sorted({match[1] for command in COMMANDS if (match := re.match(SCRIPT, command))}))
def test_commands_of_scripts_are_valid(command: str) -> None:
    assert "run_dir:" in stdout_of(*shlex.split(command, comments=True), "--print-config")


@pytest.mark.parametrize("tool", sorted({match[1] for command in COMMANDS if (match := re.match(TOOL, command))}))
def test_tools_exist(tool: str) -> None:
    stdout_of(tool, "--help")


def test_every_command_is_checked_by_some_test() -> None:
    assert {"make quickstart", "make test"} <= set(commands_of(PAGES["README.md"]))
    checked = re.compile(rf"make |pip install -r requirements|{SCRIPT}|{TOOL}")
    assert not [command for command in COMMANDS if not checked.match(command) and command not in SERVING]


def test_the_serving_commands_are_those_of_the_merged_model() -> None:
    """The engines cannot be run here; the page says for each whether it was tried."""
    page = PAGES["docs/publishing.md"]
    assert set(commands_of(page)) >= set(SERVING)
    for engine in ("transformers", "llama.cpp", "Ollama", "vLLM", "Text Generation Inference"):
        assert re.search(rf"^\| {re.escape(engine)} \| (?:no; |in |with )", page, re.MULTILINE), engine


@pytest.mark.parametrize(
    ("name", "program", "command"),
    [
        ("README.md", "fill_readme", "make readme"),
        ("docs/settings.md", "fill_readme", "make readme"),
        ("README.md", "fill_results", "make results-page"),
        ("docs/results.md", "fill_results", "make results-page"),
        ("docs/performance.md", "fill_performance", "make performance"),
        ("docs/scaling.md", "fill_scaling", "make performance"),
        ("docs/hardware.md", "fill_hardware", "make performance"),
        ("docs/reliability.md", "fill_reliability", "python docs/fill_reliability.py"),
        ("docs/metrics.md", "fill_significance", "python docs/fill_significance.py"),
    ],
)
def test_generated_tables_are_current(name: str, program: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    blocks = importlib.import_module("blocks")
    of_page = importlib.import_module(program).blocks
    content = of_page(name) if program in ("fill_readme", "fill_results") else of_page()
    assert blocks.filled(PAGES[name], content) == PAGES[name], f"run {command}"


@pytest.mark.parametrize("name", PAGES)
def test_keys_that_a_page_names_exist(name: str) -> None:
    sections = {key.partition(".")[0] for key in all_keys() if "." in key}
    named = set(re.findall(rf"`(?:--)?((?:{'|'.join(sections)})\.[a-z_]+)\b(?!\()", PAGES[name]))
    assert named <= all_keys().keys()


def test_the_readme_is_short_and_its_index_finds_every_page() -> None:
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 250
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)[#)]", readme))
    assert {name for name in PAGES if name not in ("README.md", "quickstart/README.md")} <= linked


def test_the_tests_that_pages_name_exist() -> None:
    """Files, and in SECURITY.md for each threat the tests in them."""
    named = {name for text in PAGES.values() for name in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", text)}
    defined = {
        f"{path.relative_to(ROOT).as_posix()}{found}"
        for path in (ROOT / "tests").rglob("*.py")
        for found in ["", *(f"::{test}" for test in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))]
    }
    assert len(named) > 30 and named <= defined
    threats = re.findall(r"^\|.*\|$", PAGES["SECURITY.md"].partition("## What holds")[2], re.MULTILINE)[2:]
    assert threats and all("::test_" in row.rpartition(" | ")[2] for row in threats)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[name]):
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name} links to {target}#{anchor}"
