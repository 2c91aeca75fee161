"""Whole or not at all, through exceptions and kills; one run a folder; manifests that notice every damage."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from children import WAIT, child, kill
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kestrel.errors import Interrupted, KestrelError
from kestrel.runtime import manifest
from kestrel.runtime.atomic import clear_leftovers, folder_atomically, read_json, write_atomically, write_json
from kestrel.runtime.manifest import MANIFEST, differences, identity_of, read_manifest, require_equal, write_manifest
from kestrel.runtime.run_folder import locked_run_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- files and folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "content"), [("w", "größer\n"), ("wb", b"\x00\xff")])
def test_a_file_appears_whole(tmp_path: Path, mode: str, content: str | bytes) -> None:
    path = tmp_path / "a" / "b.txt"
    with write_atomically(path, mode) as file:
        file.write(content)
        file.flush()
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), write_atomically(path, mode) as file:
        file.write(content * 2)
        raise ZeroDivisionError
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(path.parent) == ["b.txt"]


def test_a_folder_appears_whole_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "dataset"
    for content in ("one", "two"):
        with folder_atomically(path) as folder:
            (folder / content).write_text(content)
            assert not (path / content).exists()
        assert names(path) == [content]
    with pytest.raises(KeyboardInterrupt), folder_atomically(path) as folder:
        (folder / "three").write_text("")
        raise KeyboardInterrupt
    assert names(path) == ["two"] and names(tmp_path) == ["dataset"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a run that was deleted")
    with folder_atomically(link) as folder:
        (folder / "four").write_text("")
    assert names(link) == ["four"] and names(tmp_path) == ["dataset", "link"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dataset"
    with folder_atomically(path) as folder:
        (folder / "old").write_text("")
    replace = os.replace

    def fail_into_place(source: str | Path, target: str | Path) -> None:
        if Path(target) == path and "incomplete" in str(source):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(manifest.os, "replace", fail_into_place)
    with pytest.raises(OSError, match="no"), folder_atomically(path) as folder:
        (folder / "new").write_text("")
    assert names(path) == ["old"] and names(tmp_path) == ["dataset"]


REPLACE = "with folder_atomically(Path(sys.argv[1])) as folder: (folder / 'new').write_text('')\n"
KILLED_AT = {
    "writing": f"with folder_atomically(Path(sys.argv[1])) as folder:\n (folder / 'new').write_text(''); {WAIT}",
    "between the renames": "replace = os.replace\n"
    f"def first_only(source, target):\n replace(source, target)\n {WAIT}os.replace = first_only\n{REPLACE}",
    "after the renames": "import shutil\n"
    f"def wait(path, **_):\n if 'former' in str(path): {WAIT}shutil.rmtree = wait\n{REPLACE}",
    "a file": f"with write_atomically(Path(sys.argv[1]) / 'old') as file:\n file.write('half'); {WAIT}",
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "dataset"
    with folder_atomically(path) as folder:
        (folder / "old").write_text("old")
    kill(child(KILLED_AT[moment], str(path)))
    assert len(names(tmp_path)) > 1 or len(names(path)) > 1, "the kill came too late to show anything"
    with locked_run_folder(str(tmp_path), "x: 1\n"):
        pass
    assert names(tmp_path) == [".lock", "config.yaml", "dataset"]
    assert names(path) == (["new"] if moment == "after the renames" else ["old"])
    assert moment == "after the renames" or (path / "old").read_text() == "old"


def test_leftovers_are_cleared_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / ".x.incomplete-1" / "deep").mkdir(parents=True)
    (tmp_path / "a" / ".y.jsonl.incomplete-77").write_text("")
    (tmp_path / "a" / ".z.former-3").mkdir()
    (tmp_path / "a" / "z").mkdir()
    (tmp_path / "a" / ".hidden").write_text("the user's")
    clear_leftovers(tmp_path)
    assert names(tmp_path / "a") == [".hidden", "z"]


# -- the run folder ---------------------------------------------------------------------------------------------------


def test_settings_that_were_refused_are_not_written(tmp_path: Path) -> None:
    with locked_run_folder(str(tmp_path / "run"), "a: 1\n"):
        pass
    with pytest.raises(KestrelError), locked_run_folder(str(tmp_path / "run"), "a: 2\n"):
        raise KestrelError("made with other settings")
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"
    with pytest.raises(KestrelError), locked_run_folder(str(tmp_path / "typo"), "a: 1\n"):
        raise KestrelError("there is no dataset")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(Interrupted), locked_run_folder(str(tmp_path / "run"), "a: 3\n"):
        raise Interrupted(15)
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 3\n"


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300])
def test_a_run_dir_that_cannot_be_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    problem = pytest.raises(KestrelError, match=r"cannot be created .* another run_dir")
    with problem, locked_run_folder(str(tmp_path / name), ""):
        pass


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data.bin").write_bytes(b"data" * 100)
    (folder / "sub" / MANIFEST).write_text("{}")
    write_manifest(folder, "thing", {"seed": 1}, {"source": "a"}, prompt={"x": 1})
    return folder


def refused(folder: Path, *parts: str, kind: str = "thing") -> None:
    with pytest.raises(KestrelError) as caught:
        read_manifest(folder, kind, "mend it with: make")
    for part in (*parts, "mend it with: make"):
        assert part in str(caught.value)


def test_a_sound_artifact(artifact: Path) -> None:
    manifest = read_manifest(artifact, "thing", "")
    assert manifest["settings"] == {"seed": 1} and manifest["prompt"] == {"x": 1}
    assert set(manifest["files"]) == {"sub/data.bin", f"sub/{MANIFEST}"}
    assert {"python", "torch", "transformers"} <= set(manifest["versions"]) and "git_commit" in manifest
    first = identity_of(manifest)
    write_manifest(artifact, "thing", {"seed": 1}, {"source": "a"}, prompt={"x": 1}, note="made again")
    assert identity_of(read_manifest(artifact, "thing", "")) == first
    write_manifest(artifact, "thing", {"seed": 2}, {"source": "a"}, prompt={"x": 1})
    assert identity_of(read_manifest(artifact, "thing", "")) != first


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"text"', "{}", '{"kind": "thing"}', '{"kind": "thing", "schema_version": 1}', "[" * 10**5]
    + ['{"kind": "thing", "schema_version": 1, "settings": [], "made_from": {}, "files": {}}', "\ufeff{}", "{}{}"]
    + ['{"kind": "thing", "schema_version": "1"}', "9" * 5000, "\x00"],
)  # fmt: skip
def test_invalid_manifests_are_refused(artifact: Path, text: str) -> None:
    (artifact / MANIFEST).write_text(text, encoding="utf-8")
    refused(artifact, MANIFEST)


@hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_manifest_is_refused_or_says_the_same(artifact: Path, at: float, bit: int, cut: bool) -> None:
    path = artifact / MANIFEST
    sound, before = path.read_bytes(), read_manifest(artifact, "thing", "")
    index = min(int(at * len(sound)), len(sound) - 2)
    damaged = bytearray(sound)
    damaged[index] ^= 1 << bit
    path.write_bytes(sound[:index] if cut else bytes(damaged))
    with contextlib.suppress(KestrelError):
        after = read_manifest(artifact, "thing", "")
        assert not cut
        assert list(differences(before, after)) != [] or before == after
        assert after["files"].items() <= before["files"].items(), "every file that is named was checked"
    path.write_bytes(sound)


def test_damaged_artifacts(artifact: Path) -> None:
    data = artifact / "sub" / "data.bin"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(artifact, str(data), "damaged or was edited")
    data.write_bytes(content[:7] + b"X" + content[8:])
    refused(artifact, str(data), "damaged or was edited")
    read_manifest(artifact, "thing", "", check_files=False)
    data.unlink()
    refused(artifact, str(data), "is missing")
    refused(artifact, "does not describe a dataset", kind="dataset")
    write_json(artifact / MANIFEST, read_json(artifact / MANIFEST, "") | {"schema_version": 99})
    refused(artifact, "schema version 99")
    (artifact / MANIFEST).unlink()
    refused(artifact, "does not exist")
    (artifact / MANIFEST).mkdir()
    refused(artifact, "cannot be read")
    shutil.rmtree(artifact)
    refused(artifact, "does not exist")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": [1, 2.5, None]})
    for wrong in (math.nan, math.inf, object(), "\ud800"):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": 1, "b": wrong})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, 2.5, None]} and names(tmp_path) == ["a.json"]


def test_differences_name_each_leaf() -> None:
    old = {"a": {"b": 1, "c": [1], "gone": "x"}, "same": 0, "long": list(range(500))}
    new = {"a": {"b": 2, "c": [1], "new": "y"}, "same": 0, "long": []}
    with pytest.raises(KestrelError) as caught:
        require_equal("it", old, new, "do this")
    lines = str(caught.value).splitlines()
    assert lines[0] == "it was made with other settings; do this"
    assert lines[1:4] == ["  a.b: it was 1, now 2", "  a.gone: it was 'x', now None", "  a.new: it was None, now 'y'"]
    assert lines[4].startswith("  long: it was [0, 1, 2") and len(lines[4]) < 150 and len(lines) == 5
    require_equal("it", old, old, "do this")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
)


OBJECT = st.dictionaries(st.text(max_size=3), JSON, max_size=4)


@hypothesis_settings(deadline=None, max_examples=150)
@given(one=OBJECT, two=OBJECT)
def test_no_difference_means_equal(one: dict, two: dict) -> None:
    """Except that a key that is absent and one that is null are the same, as for a setting that came later."""

    def without_nulls(value: object) -> object:
        if isinstance(value, dict):
            kept = {key: without_nulls(item) for key, item in value.items()}
            return {key: item for key, item in kept.items() if item is not None} or None
        return value

    assert not list(differences(one, one))
    if without_nulls(one) != without_nulls(two):
        assert list(differences(one, two))
