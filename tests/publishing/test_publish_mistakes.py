"""Publishing in the wrong order, to the wrong place, on a bad day: refused with what to do, and nothing half sent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Experiment
from hub_server import USER, Hub
from publishing_runs import REPO, publishing, run, stopped_at_a_large_file

import generate
import publish
from kestrel.errors import KestrelError
from kestrel.publishing.run_records import read_adapter_files
from kestrel.publishing.upload import PUBLISHED_FILES
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.manifest import sha256_of, with_own_hash


def sent(hub: Hub) -> list[str]:
    """What could have changed something there; the check of the metadata does not."""
    asked = [request for request in hub.requests if request.startswith(("POST", "PUT"))]
    return [request for request in asked if request != "POST /api/validate-yaml"]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--run_dir", "NEW"], 1, "there is no adapter in"),
        (["--model.adapter", "someone/lora"], 2, "only the run's own adapter is published, not someone/lora"),
        (["--hub.repo_id", "tester/x.git"], 2, "expected an id on the Hub"),
        (["--hub.datasets", "my data"], 2, "expected ids on the Hub such as owner/name, found 'my data'"),
        (["--dryrun"], 2, "did you mean --dry-run?"),
        (["--merge"], 2, "--merge"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(
    evaluated: Experiment, tmp_path: Path, capsys, more: list[str], status: int, message: str
) -> None:
    given = publishing(evaluated, *(str(tmp_path / "new") if word == "NEW" else word for word in more))
    assert publish.main(given) == status
    assert message in capsys.readouterr().err


def test_the_runs_own_adapter_may_be_named(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    own = ["--model.adapter", str(evaluated.run / "logs" / ".." / "adapter"), "--dry-run"]
    done = run("publish.py", *publishing(evaluated, *own), hub=hub, home=tmp_path)
    assert done.status == 0, done.said


def test_base_and_data_that_the_card_names_must_be_on_the_hub(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "config.json", {**read_json(evaluated.base / "config.json", ""), "hidden_size": 128})
    hub.add("tiny/other", other)
    hub.add("tiny/empty", evaluated.run / "logs")
    hub.datasets.add("tiny/dialogues")
    for more, message in (
        (["--hub.base_model", "tiny/typo"], "hub.base_model tiny/typo: the Hub knows no such repository"),
        (["--hub.base_model", "tiny/empty"], "hub.base_model tiny/empty: the repository lacks a file"),
        (["--hub.base_model", "tiny/other"], "its hidden_size is 128 on the Hub but 64 in model.name"),
        (["--hub.datasets", "tiny/dialogues", "tiny/typo"], "the data set tiny/typo that the card would name"),
    ):
        done = run("publish.py", *publishing(evaluated, *more), hub=hub, home=tmp_path / "home")
        assert done.status == 1 and message in done.said, done.said
    assert sent(hub) == []
    done = run(
        "publish.py", *publishing(evaluated, "--hub.datasets", "tiny/dialogues"), hub=hub, home=tmp_path / "home"
    )
    assert done.status == 0 and "- tiny/dialogues" in hub.repositories[REPO].files["README.md"].decode(), done.said


def test_a_repository_with_other_things_is_not_written_to(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    """One's own of another model, somebody else's of a model, somebody else's empty one."""
    hub.add(f"{USER}/model", evaluated.base, private=True)
    hub.add("somebody/model", evaluated.base)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add("somebody/new", tmp_path / "new")
    before = {name: dict(repository.commits) for name, repository in hub.repositories.items()}
    for name, message in (
        (
            f"{USER}/model",
            "holds config.json, generation_config.json, model.safetensors but no adapter of Kestrel",
        ),
        ("somebody/model", "name another repository"),
        ("somebody/new", "the token may not write there"),
        ("somebody/none", "the token may not write there"),
    ):
        given = publishing(evaluated, "--hub.repo_id", name, "--hub.private", "false")
        done = run("publish.py", *given, hub=hub, home=tmp_path / "home")
        assert done.status == 1 and message in done.said and "Traceback" not in done.said, done.said
    assert {name: dict(repository.commits) for name, repository in hub.repositories.items()} == before


def test_an_empty_repository_made_on_the_hubs_page_is_taken_and_stays_private(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add(REPO, tmp_path / "new", private=True)
    given = publishing(evaluated, "--hub.private", "false")
    done = run("publish.py", *given, hub=hub, home=tmp_path / "home")
    assert done.status == 0 and "the repository is private and stays so" in done.said, done.said
    assert hub.repositories[REPO].private


def test_without_a_network_it_is_said_which_way(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    done = run("publish.py", *publishing(evaluated), hub=hub, home=tmp_path, HF_HUB_OFFLINE="1")
    assert done.status == 1 and "HF_HUB_OFFLINE forbids the network" in done.said and "unset it" in done.said
    done = run("publish.py", *publishing(evaluated), hub=hub, home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.status == 1 and "connection failed" in done.said and "Traceback" not in done.said, done.said


def test_ctrl_c_in_the_middle_of_an_upload_ends_it_and_the_same_command_goes_on(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    done = stopped_at_a_large_file("publish.py", *publishing(evaluated), hub=hub, home=tmp_path)
    assert done.status == 130 and "run the same command again" in done.said and "Traceback" not in done.said
    assert len(hub.repositories[REPO].commits) == 1, "nothing is there in part"
    assert run("publish.py", *publishing(evaluated), hub=hub, home=tmp_path).status == 0
    assert "adapter_model.safetensors" in hub.repositories[REPO].files


def test_what_was_tried_out_from_the_hub_can_be_published_again(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    """generate.py with the published adapter, in the run's folder, makes the evaluation no one of another adapter."""
    given = publishing(evaluated, "--run_dir", str(tmp_path / "run"))
    shutil.copytree(evaluated.run, tmp_path / "run")
    assert run("publish.py", *given, hub=hub, home=tmp_path / "home").status == 0
    done = run("generate.py", *given, "--model.adapter", REPO, hub=hub, home=tmp_path / "home")
    assert done.status == 0, done.said
    done = run("publish.py", *given, hub=hub, home=tmp_path / "home")
    assert done.status == 0 and "no commit was made" in done.said, done.said


def test_an_evaluation_of_answers_that_are_gone_is_refused(evaluated: Experiment, tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    given = publishing(evaluated, "--run_dir", str(run_dir), "--dry-run")
    shutil.copytree(evaluated.run, run_dir)
    fewer = ["--generation.max_dialogues", "1"]
    assert generate.main(evaluated.arguments("--run_dir", str(run_dir), *fewer)) == 0
    assert publish.main(given) == 1
    assert "has replaced or removed since; delete" in capsys.readouterr().err
    (run_dir / "evaluation" / "metrics.json").write_text(json.dumps({"systems": {}}))
    assert publish.main(given) == 1
    assert "metrics.json is damaged or scores no adapter" in capsys.readouterr().err


def test_metadata_that_the_hub_itself_refuses_stops_it_before_anything_is_sent(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    hub.refused_metadata = '"license" must be one of [...]'
    done = run("publish.py", *publishing(evaluated, "--hub.license", "apache-3.0"), hub=hub, home=tmp_path)
    assert done.status == 1 and 'refuses the card\'s metadata: "license" must be' in " ".join(done.said.split()), (
        done.said
    )
    assert sent(hub) == []


def test_other_files_of_the_run_are_not_published(evaluated: Experiment, tmp_path: Path, capsys) -> None:
    shutil.copytree(evaluated.run, tmp_path / "run")
    for name in ("dialogues.jsonl", "optimizer.pt", ".env", "vocab.txt"):
        (tmp_path / "run" / name).write_text("mine")
    assert publish.main(publishing(evaluated, "--run_dir", str(tmp_path / "run"), "--dry-run")) == 0
    listed = set(re.findall(r"^ +[\d,]+  [0-9a-f]{64}  (\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert {"README.md", "adapter_model.safetensors", "prompt.json"} <= listed <= set(PUBLISHED_FILES)


def linked(path: Path) -> None:
    """Moves a file or folder away and leaves a link to it."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def listed_in_the_manifest(adapter: Path) -> None:
    manifest = read_json(adapter / "manifest.json", "")
    manifest["files"]["../config.yaml"] = sha256_of(adapter / ".." / "config.yaml")
    write_json(adapter / "manifest.json", with_own_hash(manifest))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda adapter: (adapter / "notes.md").write_text("mine"), "holds 'notes.md'"),
        (lambda adapter: (adapter / "vocab.txt").symlink_to("/etc/passwd"), "holds 'vocab.txt'"),
        (lambda adapter: (adapter / "merges.txt").hardlink_to(adapter / ".." / "config.yaml"), "holds 'merges.txt'"),
        (lambda adapter: os.mkfifo(adapter / "\x1b[2Jvocab.json"), r"holds '\x1b[2Jvocab.json'"),
        (listed_in_the_manifest, "holds '../config.yaml'"),
        (lambda adapter: linked(adapter), "adapter cannot be published: it is a link"),
        (lambda adapter: (adapter / "prompt.json").unlink(), "prompt.json cannot be published: No such file"),
        (lambda adapter: (adapter / "prompt.json").write_text("{}"), "prompt.json is damaged or was edited"),
    ],
)
def test_only_regular_files_that_the_manifest_lists_are_published(
    evaluated: Experiment, tmp_path: Path, capsys, tamper: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(evaluated.run, tmp_path / "run")
    tamper(tmp_path / "run" / "adapter")
    assert publish.main(publishing(evaluated, "--run_dir", str(tmp_path / "run"))) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("replace", [linked, lambda path: (path.unlink(), os.mkfifo(path))])
def test_link_or_pipe_in_place_of_a_listed_file_is_not_opened(evaluated: Experiment, tmp_path: Path, replace) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(evaluated.run / "adapter", adapter)
    digests = read_json(adapter / "manifest.json", "")["files"]
    replace(adapter / "prompt.json")
    (adapter / "elsewhere").unlink(missing_ok=True)
    with pytest.raises(KestrelError, match=r"prompt.json (cannot be published: it is a link|is not a regular file)"):
        read_adapter_files(adapter, digests, "")


def test_spaces_in_paths(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    run_dir = tmp_path / "my runs" / "the first"
    shutil.copytree(evaluated.run, run_dir)
    done = run("publish.py", *publishing(evaluated, "--run_dir", str(run_dir)), hub=hub, home=tmp_path / "my home")
    assert done.status == 0 and b"run_dir: runs/the first" in hub.repositories[REPO].files["config.yaml"], done.said
    assert not any(str(tmp_path).encode() in content for content in hub.repositories[REPO].files.values())
