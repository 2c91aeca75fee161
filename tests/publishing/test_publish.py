"""What is published, loaded back and refused, through the command line against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from experiment import Experiment
from hub_state import TOKEN, Hub
from publishing_runs import BASE, REPO, ROOT, published, publishing, run

import publish
from kestrel.adapter.load import load_model
from kestrel.config.resolve import resolve
from kestrel.errors import KestrelError
from kestrel.evaluation.markdown import escape
from kestrel.generation.respond import respond
from kestrel.prompt.prompt import Prompt
from kestrel.prompt.tokenizer import load_tokenizer
from kestrel.publishing.model_card import check_metadata
from kestrel.publishing.upload import PUBLISHED_FILES
from kestrel.publishing.usage import EXAMPLE
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.manifest import with_own_hash


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_published_and_loaded_back_it_gives_the_same_tokens(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    done = published(evaluated, hub, tmp_path)
    assert done.status == 0, done.said
    repository = hub.repositories[REPO]
    assert repository.private and len(repository.commits) == 2
    names = repository.files.keys() - {".gitattributes"}
    assert {"README.md", "metrics.json", "config.yaml", "prompt.json"} <= names <= set(PUBLISHED_FILES)
    listed = re.findall(r"^ +[\d,]+  ([0-9a-f]{64})  (\S+)$", done.said, re.MULTILINE)
    sent = {name: hashlib.sha256(repository.files[name]).hexdigest() for name in names}
    assert {name: digest for digest, name in listed} == sent, "exactly what is listed is sent"
    everything = b"".join(repository.files.values())
    for local in (TOKEN, str(tmp_path), str(evaluated.run), str(evaluated.base), str(evaluated.source), str(ROOT)):
        assert local.encode() not in everything, local

    # Nothing is trained in the new run, and its base comes from the Hub too.
    fresh = tmp_path / "fresh"
    arguments = evaluated.arguments("--run_dir", str(fresh), "--model.name", BASE, "--model.adapter", REPO)
    assert run("preprocess.py", *arguments, hub=hub, home=tmp_path / "home").status == 0
    done = run("generate.py", *arguments, hub=hub, home=tmp_path / "home")
    assert done.status == 0 and "proven: it computes" in done.said, done.said
    for name in ("test.adapter.jsonl", "test.base.jsonl"):
        assert rows(fresh / "generations" / name) == rows(evaluated.run / "generations" / name)
    # What came once is there without a network too.
    shutil.rmtree(fresh / "generations")
    hub.endpoint = "http://127.0.0.1:9"
    done = run("generate.py", *arguments, "--generation.max_dialogues", "1", hub=hub, home=tmp_path / "home")
    assert done.status == 0 and "cache on this machine is used" in done.said, done.said


def test_card_says_what_manifests_and_metrics_say(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    assert published(evaluated, hub, tmp_path).status == 0
    card = hub.repositories[REPO].files["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    metrics = json.loads((evaluated.run / "evaluation" / "metrics.json").read_text())
    assert (data["base_model"], data["license"], data["library_name"]) == (BASE, "apache-2.0", "peft")
    assert data["pipeline_tag"] == "text-generation" and data["language"] == ["en"]
    sent = {name: hub.repositories[REPO].files[name] for name in ("adapter_config.json", "manifest.json")}
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(sent["manifest.json"])["base_model"]["name"] == BASE
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test"
    scores = metrics["systems"]["adapter"]
    given = {metric["name"]: metric for metric in result["metrics"]}
    for name, key in (("BLEU", "bleu"), ("ROUGE-L", "rouge_l"), ("F1", "f1")):
        assert given[name]["value"] == pytest.approx(scores[key]["score"], abs=1e-4)
        assert given[name]["args"]["ci95"] == (scores[key]["ci95"] or [])  # none below six dialogues
        assert given[name]["args"]["signature"] == scores[key]["signature"]
        trivial = {n: e[key]["score"] for n, e in metrics["systems"].items() if e["kind"] == "trivial"}
        assert trivial and given[name]["args"]["trivial_systems"] == pytest.approx(trivial, abs=1e-4)
    assert given["Perplexity per token"]["value"] == pytest.approx(scores["perplexity"]["token"], abs=1e-4)
    shown = card.replace("\\", "")
    for system in metrics["systems"]:
        assert f"| {system} |" in shown
    manifest = json.loads((evaluated.run / "adapter" / "manifest.json").read_text())
    assert f"{manifest['trainable_parameters']:,} trained parameters" in card and manifest["git_commit"][:7] in shown
    facts = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", card, re.MULTILINE))
    assert facts["hardware"].startswith("1 × ") and facts["energy"] == "not recorded"
    dataset = json.loads((evaluated.run / "dataset" / "manifest.json").read_text())
    assert dataset["made_from"]["source"] and manifest["made_from"]["dataset"] in facts["data"]
    for name, digest in dataset["made_from"]["source"].items():
        assert facts[f"sha256 of {name}"] == digest
    assert data["base_model_relation"] == "adapter" and "Answers: greedy search; at most 8 tokens" in card
    assert all(escape(verdict) in card for verdict in metrics["verdicts"])


def test_the_card_says_what_was_trained_before(evaluated: Experiment, tmp_path: Path, capsys) -> None:
    shutil.copytree(evaluated.run, tmp_path / "run")
    manifest = read_json(tmp_path / "run" / "adapter" / "manifest.json", "")
    before = {"history": [{"steps": 1234, "learning_rate": 5e-4}], "init_adapter": {"sha256": "a" * 64}}
    write_json(tmp_path / "run" / "adapter" / "manifest.json", with_own_hash({**manifest, **before}))
    assert publish.main(publishing(evaluated, "--run_dir", str(tmp_path / "run"), "--dry-run")) == 0
    card = capsys.readouterr().out
    assert "| before it was trained on | 1,234 steps in all, learning rate 0.0005 |" in card
    assert f"| begun from | another adapter, sha256 of its weights {'a' * 64} |" in card


def test_usage_of_the_card_gives_the_answer_of_this_project(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    assert published(evaluated, hub, tmp_path).status == 0
    card = hub.repositories[REPO].files["README.md"].decode()
    program = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert program
    (tmp_path / "usage.py").write_text(program[1])
    done = run(str(tmp_path / "usage.py"), hub=hub, home=tmp_path)
    assert done.status == 0, done.said
    settings, _ = resolve(str(evaluated.config), {})
    prompt = Prompt(load_tokenizer(settings.model), "plain", settings.prompt.max_length)
    adapter = evaluated.run / "adapter"
    model = load_model(settings, prompt, (adapter, read_json(adapter / "manifest.json", "")))
    chosen = settings.generation.model_copy(update={"max_new_tokens": 64, "stop_strings": []})
    (expected,) = respond(model, prompt, [prompt.open_context(EXAMPLE)], chosen)
    assert " ".join(expected.text.split()) in " ".join(done.said.split())


def test_same_content_makes_no_second_commit_and_other_content_does(
    evaluated: Experiment, hub: Hub, tmp_path: Path
) -> None:
    assert published(evaluated, hub, tmp_path).status == 0
    again = published(evaluated, hub, tmp_path)
    assert again.status == 0 and "no commit was made" in again.said
    assert len(hub.repositories[REPO].commits) == 2 and len(hub.uploaded) == 1
    # An evaluation that is gone is gone from the Hub too; what somebody else put there stays.
    hub.repositories[REPO].files["notes.txt"] = b"mine"
    copy = tmp_path / "copy"
    shutil.copytree(evaluated.run, copy)
    shutil.rmtree(copy / "evaluation")
    done = published(evaluated, hub, tmp_path, "--run_dir", str(copy))
    assert done.status == 0 and "has no evaluation" in done.said
    assert {"notes.txt"} <= hub.repositories[REPO].files.keys() and len(hub.repositories[REPO].commits) == 3
    assert "metrics.json" not in hub.repositories[REPO].files and len(hub.uploaded) == 1


def test_interrupted_upload_is_finished_by_the_same_command(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    hub.dropped_uploads = 20  # more often than the client tries again by itself, for which it waits half a minute
    impatient = tmp_path / "impatient.py"
    impatient.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom huggingface_hub.utils import _http\n"
        "_http.time.sleep = lambda seconds: None\nimport publish\nsys.exit(publish.main())\n",
        encoding="utf-8",
    )
    done = run(str(impatient), *publishing(evaluated), hub=hub, home=tmp_path)
    assert done.status == 1 and "run the same command again" in done.said and "Traceback" not in done.said
    assert len(hub.repositories[REPO].commits) == 1 and not hub.uploaded  # as it was made
    hub.dropped_uploads, hub.failing_commits = 0, 1
    done = published(evaluated, hub, tmp_path)
    assert done.status == 1 and "the same command again" in done.said and len(hub.uploaded) == 1
    assert published(evaluated, hub, tmp_path).status == 0
    assert "adapter_model.safetensors" in hub.repositories[REPO].files
    assert len(hub.uploaded) == 1, "what had arrived was not sent again"


def test_dry_run_shows_all_and_sends_nothing(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    own = str(evaluated.run / "logs" / ".." / "adapter")  # the run's own adapter may be named
    done = published(evaluated, hub, tmp_path, "--dry-run", "--model.adapter", own, token=None)
    assert done.status == 0 and "nothing was sent" in done.said and "model-index" in done.said, done.said
    assert not [request for request in hub.requests if request.startswith(("POST", "PUT"))]
    for name in ("adapter_model.safetensors", "README.md", "metrics.json"):
        assert re.search(rf"\d  [0-9a-f]{{64}}  {name}", done.said)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("prompt_sha256", "scores another adapter"),
        ("dataset", "was trained on another data set"),
        ("tokens", "lacks what the card says"),
    ],
)
def test_evaluation_or_dataset_of_another_adapter_is_refused(
    evaluated: Experiment, tmp_path: Path, capsys, key: str, message: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(evaluated.run, copy)
    if key != "prompt_sha256":
        shutil.rmtree(copy / "evaluation")
    manifest = read_json(copy / "adapter" / "manifest.json", "")
    (manifest if key == "tokens" else manifest["made_from"])[key] = "0" * 64
    write_json(copy / "adapter" / "manifest.json", with_own_hash(manifest))
    assert publish.main(publishing(evaluated, "--run_dir", str(copy), "--dry-run")) == 1
    assert message in capsys.readouterr().err


def test_the_token_is_written_nowhere(evaluated: Experiment, hub: Hub, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(evaluated.run, copy)
    said = []
    for failing, more in ((1, ["--debug"]), (0, []), (0, ["--hub.repo_id", "somebody/else", "--debug"])):
        hub.failing_commits = failing
        said.append(published(evaluated, hub, tmp_path / "home", "--run_dir", str(copy), *more).said)
    assert "Traceback" in said[0] and "Traceback" in said[2] and TOKEN not in "".join(said)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN.encode() not in b"".join(hub.repositories[REPO].files.values())


def test_metadata_that_the_hub_would_refuse_is_told() -> None:
    check_metadata("---\nlicense: apache-2.0\nlanguage:\n- en\n---\nhi")
    for bad in ("license: Apache License", "language: english", "license: other", "license: [", "- a"):
        with pytest.raises(KestrelError):
            check_metadata(f"---\n{bad}\n---\nhi")
