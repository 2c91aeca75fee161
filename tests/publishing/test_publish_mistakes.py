"""Publishing in the wrong order, to the wrong place, on a bad day: refused with what to do, and nothing half sent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from experiment import Experiment
from hub_state import USER, Hub
from huggingface_hub import constants
from publishing_runs import BASE, REPO, end, published, publishing, run, start, stopped_at_a_large_file

import generate
import publish
from kestrel.config.resolve import describe, resolve
from kestrel.errors import KestrelError
from kestrel.publishing.contents import public_settings, refuse_private_text
from kestrel.publishing.run_records import read_adapter_files
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.manifest import sha256_of, with_own_hash

NEW = {"README.md": b"---\nlicense: mit\n---\n"}  # a repository as the Hub's page creates it


def sent(hub: Hub) -> list[str]:
    """What could have changed something there; the check of the metadata does not."""
    asked = [request for request in hub.requests if request.startswith(("POST", "PUT"))]
    return [request for request in asked if request != "POST /api/validate-yaml"]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ("--run_dir no/such/run", 1, "there is no adapter in"),
        ("--model.adapter someone/lora", 2, "only the run's own adapter is published, not someone/lora"),
        ("--hub.base_model null", 1, "is a folder of this machine"),
        ("--hub.repo_id null", 2, "hub.repo_id"),
        ("--hub.repo_id ../evil", 2, "expected an id on the Hub"),
        ("--hub.repo_id tester/x.git", 2, "expected an id on the Hub"),
        ("--hub.datasets 'my data'", 2, "expected ids on the Hub such as owner/name, found 'my data'"),
        ("--hub.license 'Apache 2.0'", 1, "hub.license"),
        ("--hub.language English", 1, "hub.language"),
        ("--dryrun", 2, "did you mean --dry-run?"),
        ("--merge", 2, "--merge"),
        ("--merge no/such/folder --dry-run", 2, "leave one out"),
        ("--lora.r 8", 1, "lora.r: it was 4, now 8"),
        ("--training.learning_rate 1e-3", 1, "training.learning_rate"),
        ("--prompt.format original", 1, "prompt.format"),
        ("--data.source AlekseyKorshuk/persona-chat", 1, "data.source: it was"),
        ("--generation.do_sample --generation.temperature 1.9", 1, "generation.temperature: it was None, now 1.9"),
        ("--evaluation.normalization lower", 1, "evaluation.normalization: it was 'raw', now 'lower'"),
        ("--evaluation.resamples 200", 1, "evaluation.resamples: it was 100, now 200"),
        ("--evaluation.stemmer", 1, "evaluation.stemmer: it was False, now True"),
    ],
)
def test_wrong_command_is_refused(evaluated: Experiment, capsys, more: str, status: int, message: str) -> None:
    assert publish.main(publishing(evaluated, *shlex.split(more))) == status
    assert message in capsys.readouterr().err


def test_hub_must_have_what_the_card_names_and_take_its_metadata(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    config = {**read_json(evaluated.base / "config.json", ""), "hidden_size": 128}
    hub.add("tiny/other", {"config.json": json.dumps(config).encode()})
    hub.add("tiny/empty", {})
    hub.datasets.add("tiny/dialogues")
    for more, message in (
        (["--hub.base_model", "tiny/typo"], "hub.base_model tiny/typo: the Hub knows no such repository"),
        (["--hub.base_model", "tiny/empty"], "hub.base_model tiny/empty: the repository lacks a file"),
        (["--hub.base_model", "tiny/other"], "its hidden_size is 128 on the Hub but 64 in model.name"),
        (["--hub.datasets", "tiny/dialogues", "tiny/typo"], "the data set tiny/typo that the card would name"),
    ):
        done = published(evaluated, hub, tmp_path / "home", *more)
        assert done.status == 1 and message in done.said, done.said
    hub.refused_metadata = '"license" must be one of [...]'
    done = published(evaluated, hub, tmp_path / "home", "--hub.license", "apache-3.0")
    assert done.status == 1 and 'the Hub refuses the card\'s metadata: "license" must be' in done.said, done.said
    assert sent(hub) == []
    hub.refused_metadata = ""
    done = published(evaluated, hub, tmp_path / "home", "--hub.datasets", "tiny/dialogues")
    assert done.status == 0 and "- tiny/dialogues" in hub.repositories[REPO].files["README.md"].decode(), done.said


def test_a_repository_with_other_things_is_not_written_to(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    """One's own of another model, somebody else's of a model, somebody else's empty one."""
    hub.add(f"{USER}/model", evaluated.base, private=True)
    hub.add("somebody/model", evaluated.base)
    hub.add("somebody/new", NEW)
    before = {name: dict(repository.commits) for name, repository in hub.repositories.items()}
    theirs = "holds config.json, generation_config.json, model.safetensors but no adapter of Kestrel"
    for name, message in (
        (f"{USER}/model", theirs),
        ("somebody/model", "name another repository"),
        ("somebody/new", "the token may not read or not write there"),
        ("somebody/none", "the token may not read or not write there"),
    ):
        done = published(evaluated, hub, tmp_path / "home", "--hub.repo_id", name, "--hub.private", "false")
        assert done.status == 1 and message in done.said and "Traceback" not in done.said, done.said
    assert {name: dict(repository.commits) for name, repository in hub.repositories.items()} == before


def test_a_new_repository_of_the_hubs_page_keeps_who_may_see_it(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    hub.add(REPO, NEW, private=True)
    done = published(evaluated, hub, tmp_path / "home", "--hub.private", "false")
    assert done.status == 0 and "the repository is private and stays so" in done.said, done.said
    assert hub.repositories[REPO].private
    hub.add(REPO, NEW, private=False)
    done = published(evaluated, hub, tmp_path / "home")
    assert done.status == 1 and "is public and hub.private is true" in done.said
    done = published(evaluated, hub, tmp_path / "home", "--hub.private", "false")
    assert done.status == 0, done.said


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({"token": None}, "HF_TOKEN"),
        ({"token": "hf_WrongWrongWrong00000000000000000"}, "token is missing or wrong"),
        ({"HF_HUB_OFFLINE": "1"}, "forbids the network, and the client's cache does not have it; unset it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "connection failed"),
    ],
)
def test_without_token_or_network_nothing_is_sent(
    evaluated: Experiment, hub: Hub, tmp_path: Path, changed: dict, advice: str
) -> None:
    done = published(evaluated, hub, tmp_path, **changed)
    assert done.status == 1 and advice in done.said and "Traceback" not in done.said, done.said
    assert sent(hub) == []


def test_ctrl_c_in_the_middle_of_an_upload_ends_it_and_the_same_command_goes_on(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    done = stopped_at_a_large_file("publish.py", *publishing(evaluated), hub=hub, home=tmp_path)
    assert done.status == 130 and "run the same command again" in done.said and "Traceback" not in done.said
    assert len(hub.repositories[REPO].commits) == 1, "nothing is there in part"
    assert published(evaluated, hub, tmp_path).status == 0
    assert "adapter_model.safetensors" in hub.repositories[REPO].files


def test_adapter_that_was_tried_out_from_the_hub_can_be_published_again(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    """generate.py with the published adapter, in the run's folder, does not make the evaluation another adapter's."""
    home, run_dir = tmp_path / "my home", tmp_path / "my runs" / "the first"
    shutil.copytree(evaluated.run, run_dir)
    here = ["--run_dir", str(run_dir)]
    done = published(evaluated, hub, home, *here)
    assert done.status == 0 and b"run_dir: runs/the first" in hub.repositories[REPO].files["config.yaml"], done.said
    assert not any(str(tmp_path).encode() in content for content in hub.repositories[REPO].files.values())
    done = run("generate.py", *publishing(evaluated, *here), "--model.adapter", REPO, hub=hub, home=home)
    assert done.status == 0, done.said
    done = published(evaluated, hub, home, *here)
    assert done.status == 0 and "no commit was made" in done.said, done.said


def test_an_evaluation_of_answers_that_are_gone_or_edited_is_refused(
    evaluated: Experiment, tmp_path: Path, capsys
) -> None:
    run_dir = tmp_path / "run"
    given = publishing(evaluated, "--run_dir", str(run_dir), "--dry-run")
    shutil.copytree(evaluated.run, run_dir)
    fewer = ["--generation.max_dialogues", "1"]
    assert generate.main(evaluated.arguments("--run_dir", str(run_dir), *fewer)) == 0
    assert publish.main(given) == 1
    assert "has replaced or removed since; delete" in capsys.readouterr().err
    metrics = read_json(run_dir / "evaluation" / "metrics.json", "")
    metrics["systems"]["adapter"]["bleu"]["score"] += 10
    write_json(run_dir / "evaluation" / "metrics.json", metrics)
    assert publish.main(given) == 1
    assert "metrics.json was edited" in capsys.readouterr().err
    (run_dir / "evaluation" / "metrics.json").write_text(json.dumps({"systems": {}}))
    assert publish.main(given) == 1
    assert "metrics.json is damaged or scores no adapter" in capsys.readouterr().err


def test_settings_are_published_without_paths_names_and_personas(
    evaluated: Experiment, tmp_path: Path, monkeypatch
) -> None:
    given = {
        "data": {"source": "/mnt/a", "dataset": "/mnt/b", "self": "Ann Example", "persona": ["i am Ann."]},
        "training": {"init_adapter": "/mnt/c", "resume": "/mnt/d"},
        "evaluation": {"nli": "/mnt/e", "output": "/mnt/f"}
        | {name: ["/mnt/g"] for name in ("generations", "compare", "judgements", "extra_metrics")},
        "model": {"adapter": "/mnt/h"},
        "prompt": {"chat_template": "/mnt/i"},
    }
    settings, _ = resolve(str(evaluated.config), {})
    changed = {name: getattr(settings, name).model_copy(update=values) for name, values in given.items()}
    settings = settings.model_copy(update={"run_dir": "/mnt/j", **changed})
    public = describe(public_settings(settings, BASE), {})
    assert "/mnt" not in public and "Ann" not in public and str(evaluated.base) not in public
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("hf_OfALogin0000000000")
    with pytest.raises(KestrelError, match="contains the Hub's token"):
        refuse_private_text("README.md", b"the token hf_OfALogin0000000000")
    for before in ("in '", "nli:", "(", ""):
        with pytest.raises(KestrelError, match="names a folder of this machine"):
            refuse_private_text("README.md", f"{before}{Path.cwd()}/runs'".encode())


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
        (lambda adapter: (adapter / ".." / "x").hardlink_to(adapter / "prompt.json"), "prompt.json is a hard link"),
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
    given = publishing(evaluated, "--run_dir", str(tmp_path / "run"))
    assert publish.main(given) == 1
    assert message in capsys.readouterr().err
    assert publish.main([*given, "--merge", str(tmp_path / "merged")]) == 1
    assert not (tmp_path / "merged").exists()


def test_what_is_sent_is_what_was_listed_whatever_happens_to_the_folder_meanwhile(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    shutil.copytree(evaluated.run, tmp_path / "run")
    hub.stalled = True
    given = publishing(evaluated, "--run_dir", str(tmp_path / "run"))
    process = start("publish.py", *given, hub=hub, home=tmp_path / "home")
    try:
        assert hub.waiting.wait(120), "it has listed the files and is sending the first"
        other = shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "other")
        (other / "prompt.json").write_text("SECRET")
        (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"SECRET")
        (tmp_path / "run" / "adapter").rename(tmp_path / "run" / "moved")
        (tmp_path / "run" / "adapter").symlink_to(other)
    finally:
        hub.stalled = False
    done = end(process, 120)
    assert done.status == 0, done.said
    listed = dict(reversed(pair) for pair in re.findall(r"^ +[\d,]+  ([0-9a-f]{64})  (\S+)$", done.said, re.MULTILINE))
    files = hub.repositories[REPO].files
    assert listed == {name: hashlib.sha256(files[name]).hexdigest() for name in files if name != ".gitattributes"}
    assert b"SECRET" not in b"".join(files.values())


def a_device(path: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # what /dev/null is
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("replace", [linked, lambda path: (path.unlink(), os.mkfifo(path)), a_device])
def test_link_pipe_or_device_in_place_of_a_listed_file_is_not_opened(
    evaluated: Experiment, tmp_path: Path, replace
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(evaluated.run / "adapter", adapter)
    digests = read_json(adapter / "manifest.json", "")["files"]
    replace(adapter / "prompt.json")
    (adapter / "elsewhere").unlink(missing_ok=True)
    with pytest.raises(KestrelError, match=r"prompt.json (cannot be published: it is a link|is not a regular file)"):
        read_adapter_files(adapter, digests, "")
