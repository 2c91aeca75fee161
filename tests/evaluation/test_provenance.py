"""Generations of a run that no longer fit its other artifacts are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kestrel.errors import KestrelError
from kestrel.evaluation.generations import Generations
from kestrel.evaluation.provenance import check_provenance, difference_notes, same_experiment
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.manifest import identity_of, sha256_of, write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a dataset, an adapter and generations of both systems."""
    identities = {}
    for kind in ("dataset", "adapter"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "content").write_text(kind)
        write_manifest(tmp_path / kind, kind, settings={"seed": 0}, made_from={})
        identities[kind] = identity_of(read_json(tmp_path / kind / "manifest.json", ""))
    folder = tmp_path / "generations"
    facts = {}
    for system in ("adapter", "base"):
        write_json(folder / f"test.{system}.jsonl", {"response": system})
        made_from = {
            "dataset": identities["dataset"],
            "system": system,
            "generation": {"num_beams": 1, "split": "test"},
        }
        if system == "adapter":
            made_from["adapter"] = identities["adapter"]
        facts[f"test.{system}.jsonl"] = {"sha256": sha256_of(folder / f"test.{system}.jsonl"), "made_from": made_from}
    write_manifest(folder, "generations", settings={}, made_from={}, generations=facts)
    return tmp_path


def _check(run: Path, **decoding: object) -> None:
    files = sorted((run / "generations").glob("*.jsonl"))
    asked = {"num_beams": 1, "split": "test"} | decoding
    check_provenance(run, run / "adapter", files, "python generate.py --config c.yaml", asked)


def test_a_run_that_fits_is_accepted_also_after_the_same_artifact_was_made_again(run: Path) -> None:
    _check(run)
    write_manifest(run / "dataset", "dataset", settings={"seed": 0}, made_from={}, elsewhere="another day")
    _check(run)


@pytest.mark.parametrize("kind", ["dataset", "adapter"])
def test_another_artifact_is_refused_but_the_base_does_not_depend_on_the_adapter(run: Path, kind: str) -> None:
    write_manifest(run / kind, kind, settings={"seed": 1}, made_from={})
    with pytest.raises(KestrelError, match=rf"another {kind} .* python generate\.py"):
        _check(run)
    if kind == "adapter":
        check_provenance(run, run / "adapter", [run / "generations" / "test.base.jsonl"], "generate", {})


def test_an_edited_file_is_refused_and_one_from_elsewhere_must_be_named(run: Path) -> None:
    (run / "generations" / "test.base.jsonl").write_text(json.dumps({"response": "better"}))
    with pytest.raises(KestrelError, match=r"test\.base\.jsonl was changed"):
        _check(run)
    write_json(run / "generations" / "test.a_first.jsonl", {"response": "x"})
    with pytest.raises(KestrelError, match=r"test\.a_first\.jsonl is not in .*evaluation\.generations"):
        _check(run)


def _add_order(run: Path, **changes: object) -> None:
    folder = run / "generations"
    facts = read_json(folder / "manifest.json", "")["generations"]
    write_json(folder / "test.base-order2.jsonl", {"response": "base"})
    made_from = facts["test.base.jsonl"]["made_from"] | {"persona_order": 2} | changes
    facts["test.base-order2.jsonl"] = {"sha256": sha256_of(folder / "test.base-order2.jsonl"), "made_from": made_from}
    write_manifest(folder, "generations", settings={}, made_from={}, generations=facts)


def test_files_of_a_run_must_differ_in_nothing_but_system_and_order(run: Path) -> None:
    _add_order(run)
    _check(run)
    _add_order(run, prompt_sha256="x", generation={"num_beams": 3, "split": "test"})
    with pytest.raises(KestrelError, match=r"base-order2.*num_beams 3, and now it is 1; .*persona_orders 3, or delete"):
        _check(run)
    _add_order(run, dataset="other")
    with pytest.raises(KestrelError, match=r"base-order2.* another dataset"):
        _check(run)


def test_the_settings_of_the_call_must_be_those_of_the_files(run: Path) -> None:
    with pytest.raises(
        KestrelError, match=r"test\.adapter\.jsonl was generated with generation\.num_beams 1, and now it is 4"
    ):
        _check(run, num_beams=4)


def test_files_from_several_runs_are_compared_with_a_warning_and_averaged_only_as_seeds(
    run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "generations", other / "generations")
    facts = read_json(other / "generations" / "manifest.json", "")["generations"]

    def pair(**changes: object) -> list[Generations]:
        made_from = facts["test.adapter.jsonl"]["made_from"] | changes
        entry = {"sha256": facts["test.adapter.jsonl"]["sha256"], "made_from": made_from}
        write_manifest(other / "generations", "generations", {}, {}, generations={"test.adapter.jsonl": entry})
        return [
            Generations(name, "test", folder / "generations" / "test.adapter.jsonl", entry["sha256"], [])
            for name, folder in (("one", run), ("two", other))
        ]

    for changes, alike in (
        ({"seed": 7, "adapter": "of another seed"}, True),
        ({"generation": {"num_beams": 4}}, False),
    ):
        files = pair(**changes)
        assert same_experiment(files) == alike
        assert [note.split(" that too: ")[1] for note in difference_notes(files)] == (
            [] if alike else ["generation.num_beams (one: 1; two: 4)."]
        )
