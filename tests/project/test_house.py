"""The rules of CONTRIBUTING.md that can be checked, and the README's map of the repository.

ruff checks the number of branches of a function (C901), import-linter the layers.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KESTREL = ROOT / "kestrel"
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = [*SCRIPTS, *sorted(KESTREL.rglob("*.py"))]


def map_entries() -> list[str]:
    """The paths that the README's map names, in its order; folders end in a slash."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- map: .*?```text\n(.*?)```", readme, re.DOTALL)
    entries, parents = [], [""]
    for line in block.splitlines():
        if entry := re.match(r"( {0,4})(\S+(?: \S+)*) {2,}\S", line):
            depth, names = len(entry[1]) // 2, entry[2].split()
            entries += [parents[depth] + name for name in names]
            parents[depth + 1 :] = [entries[-1]]
    return entries


def folders_below(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix() + "/"
        for path in folder.iterdir()
        if path.is_dir() and any(file.is_file() and file.suffix != ".pyc" for file in path.rglob("*"))
    }


def test_the_map_names_every_folder_and_top_module_of_kestrel_and_no_other() -> None:
    wings = folders_below(KESTREL)
    folders = wings.union(*(folders_below(ROOT / wing) for wing in wings))
    modules = {f"kestrel/{path.name}" for path in KESTREL.glob("*.py") if path.name != "__init__.py"}
    entries = [entry for entry in map_entries() if entry.startswith("kestrel/") and entry != "kestrel/"]
    assert len(set(entries)) == len(entries)
    assert set(entries) == folders | modules


def test_the_map_names_the_scripts_and_top_folders_and_no_other() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: its own folders cannot be told from others")
    tracked = {path.partition("/") for path in listing.stdout.splitlines() if not path.startswith(".")}
    expected = {top + slash for top, slash, _ in tracked if slash or top.endswith(".py")}
    assert {entry for entry in map_entries() if not re.search("/.", entry)} == expected


def test_the_map_lists_the_wings_in_the_order_of_the_layers_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [layer.split(" | ") for layer in reversed(contract[0]["layers"])]
    rank = {name: position for position, names in enumerate(layers) for name in names}
    wings = [Path(entry).stem for entry in map_entries() if re.fullmatch(r"kestrel/\w+(?:/|\.py)", entry)]
    assert [rank[wing] for wing in wings] == sorted(rank.values())


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_scripts_files_and_functions_are_short() -> None:
    assert len(SCRIPTS) == 6
    assert [f"{path.name}: {lines_of(path)}" for path in SCRIPTS if lines_of(path) > 120] == []
    assert [f"{path.relative_to(ROOT)}: {lines_of(path)}" for path in SOURCES if lines_of(path) > 350] == []
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_few_modules_are_at_the_top_and_packages_import_nothing() -> None:
    """So that importing one module of a folder does not load torch."""
    assert len(list(KESTREL.glob("*.py"))) <= 6
    for path in KESTREL.rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        names = [node for node in tree.body[1:] if not isinstance(node, ast.Assign)]  # such as __version__
        assert not names, path
