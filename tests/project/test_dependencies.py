"""The lock has every dependency at a version that all others allow; every licence is known and permissive."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
import dependencies

FLOOR_TESTS = re.search(r"^FLOOR_TESTS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
LOCK = dependencies.pins(ROOT / "requirements.lock.txt")
DIRECT = dependencies.pins(ROOT / "requirements.txt")
FLOOR = dependencies.pins(ROOT / "requirements-floor.txt")
# Import names that differ from the package's.
PACKAGE_OF = {"yaml": "pyyaml"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-web.txt"])
def test_the_lock_has_the_required_versions(name):
    required = dependencies.pins(ROOT / name)
    assert required and {package: LOCK.get(package) for package in required} == required


def test_every_locked_package_but_torch_has_its_hashes():
    text = (ROOT / "requirements.hashes.txt").read_text(encoding="utf-8")
    entries = re.findall(
        r"^(\S+)==(\S+)(?: ;[^\n]*?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    assert {name: version for name, version, _ in entries} == {k: v for k, v in LOCK.items() if k != "torch"}
    assert len(re.sub(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?\n", "", text).splitlines()) == len(entries) + 1


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_is_complete(python):
    """Each requirement of each locked package is locked too, at a version that it allows."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    missing = []
    for package in LOCK.keys() - dependencies.OF_SOME_PYTHONS.keys():
        for text in metadata.requires(package) or ():
            required = Requirement(text)
            name = dependencies.canonical(required.name)
            if required.marker is not None and not required.marker.evaluate(machine):
                continue
            if dependencies.is_locked(name) and (name not in LOCK or not required.specifier.contains(LOCK[name], True)):
                missing.append(f"{package} needs {text}, the lock has {LOCK.get(name)}")
    assert missing == []


def test_the_locked_versions_are_installed():
    """Whatever the build of torch."""
    names = LOCK.keys() - dependencies.OF_SOME_PYTHONS.keys()
    here = {name: metadata.version(name).partition("+")[0] for name in names}
    assert {name: version for name, version in here.items() if LOCK[name] != version} == {}


def test_every_direct_dependency_has_a_floor_and_the_floors_tests_exist():
    assert FLOOR.keys() == DIRECT.keys()
    assert [name for name in FLOOR if Version(FLOOR[name]) > Version(DIRECT[name])] == []
    assert FLOOR_TESTS is not None
    assert [name for name in FLOOR_TESTS[1].split() if not (ROOT / "tests" / name).exists()] == []


def test_every_imported_package_is_required():
    imported = set()
    for path in (*ROOT.glob("*.py"), *(ROOT / "kestrel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    ours = {"kestrel", *(path.stem for path in ROOT.glob("*.py"))}
    packages = {PACKAGE_OF.get(name, name.replace("_", "-")) for name in imported - ours - set(sys.stdlib_module_names)}
    required = {*DIRECT, *dependencies.pins(ROOT / "requirements-web.txt")}
    assert {"torch", "pyyaml"} <= packages
    # triton comes with torch's builds for GPUs, and only code for GPUs imports it.
    assert packages - required - {"triton"} == set()


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
