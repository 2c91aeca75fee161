"""The lock is the whole tree and fits what is asked for; every licence is known, and none is a surprise."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("dependencies", ROOT / "tools" / "dependencies.py")
assert spec is not None and spec.loader is not None
dependencies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dependencies)

LOCK = dependencies.pins(ROOT / "requirements.lock.txt")
ASKED = dependencies.pins(ROOT / "requirements.txt")
FLOOR = dependencies.pins(ROOT / "requirements-floor.txt")
# Import names that differ from the package's.
PACKAGE_OF = {"yaml": "pyyaml", "jinja2": "jinja2", "huggingface_hub": "huggingface-hub", "rouge_score": "rouge-score"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-web.txt"])
def test_the_lock_has_what_is_asked_for(name):
    asked = dependencies.pins(ROOT / name)
    assert asked and {package: LOCK.get(package) for package in asked} == asked


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_is_the_whole_tree(python):
    """Each requirement of each locked package is locked too, at a version that it allows, on either Python."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    missing = []
    for package in LOCK:
        for text in metadata.requires(package) or ():
            wanted = Requirement(text)
            name = dependencies.canonical(wanted.name)
            if wanted.marker is not None and not wanted.marker.evaluate(machine):
                continue
            if dependencies.is_locked(name) and (name not in LOCK or not wanted.specifier.contains(LOCK[name], True)):
                missing.append(f"{package} needs {text}, the lock has {LOCK.get(name)}")
    assert missing == []


def test_the_lock_is_what_runs_here():
    """Up to the build of torch; what is installed besides belongs to nobody here."""
    here = {name: metadata.version(name).partition("+")[0] for name in LOCK}
    assert {name: version for name, version in here.items() if LOCK[name] != version} == {}


def test_every_direct_dependency_has_a_floor():
    assert FLOOR.keys() == ASKED.keys()
    assert [name for name in FLOOR if Version(FLOOR[name]) > Version(ASKED[name])] == []


def test_what_is_imported_is_asked_for():
    imported = set()
    for path in (*ROOT.glob("*.py"), *(ROOT / "kestrel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    ours = {"kestrel", *(path.stem for path in ROOT.glob("*.py"))}
    packages = {PACKAGE_OF.get(name, name) for name in imported - ours - set(sys.stdlib_module_names)}
    asked = {*ASKED, *dependencies.pins(ROOT / "requirements-web.txt")}
    assert {"torch", "pyyaml"} <= packages
    # triton comes with torch's builds for GPUs, and only code for GPUs imports it.
    assert packages - asked - {"triton"} == set()


def test_licences_are_known_and_permissive():
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([^|]+) \|[^|]*\|$", page, re.MULTILINE)
    stated = {name: (version, licence) for name, version, licence in rows if name not in ("package", "---")}
    assert {name: version for name, (version, _) in stated.items()} == LOCK
    assert page == dependencies.licences()
    copyleft = {name for name, (_, licence) in stated.items() if re.search(r"GPL|EUPL|CDDL|EPL|SSPL|BUSL", licence)}
    assert copyleft == set()
    # The Mozilla licence binds changes to these packages' own files, and nothing of ours.
    mozilla = {name for name, (_, licence) in stated.items() if "MPL" in licence}
    assert mozilla == {"certifi", "hypothesis", "orjson", "pathspec", "tqdm"}
