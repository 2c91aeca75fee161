"""What SECURITY.md promises: nothing that is read can run code, leave its folder, steer the terminal, or leak a token."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from children import python
from experiment import Experiment

import generate
import preprocess
import train
from kestrel.evaluation.evaluate_library import load_metrics
from kestrel.runtime.atomic import read_json, write_json
from kestrel.runtime.manifest import MANIFEST, files_below, with_own_hash

TOKEN = "hf_PlantedTokenThatMustNotAppearAnywhere"


class Planted(str):
    """A path that makes a folder there when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self),)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The folder that exists once something planted has run; a plain unpickling does run it."""
    folder = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Planted(folder)))
    assert folder.is_dir()
    folder.rmdir()
    return folder


def plant(path: Path, sprung: Path) -> None:
    """Writes a file, as torch writes one, that runs code wherever it is unpickled."""
    torch.save({"state": Planted(sprung)}, path)


def hash_again(folder: Path) -> None:
    """Makes a manifest fit what somebody put into a folder: whoever can change files can hash them too."""
    manifest = read_json(folder / MANIFEST, "")
    write_json(folder / MANIFEST, with_own_hash({**manifest, "files": files_below(folder)}))


def test_a_base_of_pickled_weights_is_refused(prepared: Experiment, tmp_path, sprung, capsys):
    base = shutil.copytree(prepared.base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    plant(base / "pytorch_model.bin", sprung)
    arguments = prepared.copy_to(tmp_path / "run")
    assert train.main([*arguments, "--model.name", str(base)]) == 1
    assert "holds no weights in safetensors" in capsys.readouterr().err
    assert not sprung.exists()


def test_an_adapter_of_pickled_weights_is_refused(trained: Experiment, tmp_path, sprung, capsys):
    arguments = trained.copy_to(tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter / "adapter_model.bin", sprung)
    hash_again(adapter)
    assert generate.main(arguments) == 1
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert not sprung.exists()


def test_adapter_fields_that_make_peft_import_modules_are_refused(trained: Experiment, tmp_path, capsys):
    arguments = trained.copy_to(tmp_path / "run")
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    hostile = {"megatron_config": {"a": 1}, "megatron_core": "this", "layer_replication": [[0, 1], [0, 1]]}
    for name, value in hostile.items():
        kept = config.read_text()
        write_json(config, {**json.loads(kept), name: value})
        hash_again(config.parent)
        assert generate.main(arguments) == 1, name
        assert f"{name} is" in capsys.readouterr().err
        config.write_text(kept)
    assert "this" not in sys.modules
    hash_again(config.parent)
    assert generate.main([*arguments, "--generation.max_dialogues", "1"]) == 0


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint_run_nothing(trained: Experiment, tmp_path, sprung, capsys, name):
    """Sealed, as in a run folder from a stranger; torch's own restricted unpickler is all that reads them then."""
    arguments = trained.copy_to(tmp_path / "run")
    newest, last = (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (6, 8))
    shutil.rmtree(last)  # at the end of a run there is no random state to go on with
    assert (newest / name).is_file()
    plant(newest / name, sprung)
    hash_again(newest)
    status = train.main(arguments)
    said = capsys.readouterr().err
    assert not sprung.exists()
    # What is not read at all cannot hurt either.
    assert (status, "start again" in said) == ((0, False) if name == "training_args.bin" else (1, True)), said


def test_code_of_a_model_runs_only_if_allowed_and_with_a_warning(prepared: Experiment, tmp_path, sprung):
    base = shutil.copytree(prepared.base, tmp_path / "base")
    (base / "planted.py").write_text(
        f"import os\nos.mkdir({str(sprung)!r})\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "planted.Own"]}}
    path = base / "tokenizer_config.json"
    write_json(path, read_json(path, "") | own)
    arguments = [*prepared.arguments("--run_dir", str(tmp_path / "run")), "--model.name", str(base)]
    cache = {"HF_HOME": str(tmp_path / "cache")}
    done = python("preprocess.py", *arguments, **cache)
    assert not sprung.exists() and "trust_remote_code is true" not in done.stderr
    done = python("preprocess.py", *arguments, "--model.trust_remote_code", "true", **cache)
    assert done.returncode == 0 and sprung.is_dir()
    for said in ("model.trust_remote_code is true: Python code that comes with", "token of the Hub"):
        assert said in done.stderr


def test_a_warning_says_that_a_metric_is_code(tmp_path, capsys):
    metric = tmp_path / "length"
    metric.mkdir()
    (metric / "length.py").write_text(
        "import datasets\nimport evaluate\nclass Length(evaluate.Metric):\n    def _info(self):\n"
        "        return evaluate.MetricInfo(description='', citation='', features=datasets.Features())\n"
    )
    load_metrics([])
    assert capsys.readouterr().err == ""
    load_metrics([str(metric)])
    assert f"{metric} is Python code" in capsys.readouterr().err


def test_a_chat_template_cannot_reach_python(prepared: Experiment, tmp_path, capsys):
    base = shutil.copytree(prepared.base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    arguments = prepared.arguments("--run_dir", str(tmp_path / "run"), "--model.name", str(base))
    assert preprocess.main([*arguments, "--prompt.format", "chat"]) == 1
    assert "chat template fails" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar"])
@pytest.mark.parametrize("within_folder", [True, False])
def test_archives_of_several_files_are_refused_and_none_is_unpacked(
    prepared: Experiment, tmp_path, capsys, kind, within_folder
):
    source = Path(shutil.make_archive(str(tmp_path / "data" / "train"), kind, prepared.source))
    before = set(tmp_path.rglob("*"))
    given = source.parent if within_folder else source
    arguments = prepared.arguments("--run_dir", str(tmp_path / "run"), "--data.source", str(given))
    assert preprocess.main(arguments) == 1
    assert str(given) in capsys.readouterr().err
    assert {path for path in tmp_path.rglob("*") if tmp_path / "run" not in (path, *path.parents)} == before


def test_an_archive_s_name_is_never_a_path_to_write_to(prepared: Experiment, tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    with zipfile.ZipFile(tmp_path / "inner" / "a.zip", "w") as archive:
        archive.write(next(prepared.source.glob("train*")), "../../outside.jsonl")
    arguments = prepared.arguments(
        "--run_dir", str(tmp_path / "run"), "--data.source", str(tmp_path / "inner" / "a.zip")
    )
    assert preprocess.main(arguments) == 1
    assert "one data file" in capsys.readouterr().err and not list(tmp_path.parent.glob("outside*"))


def test_a_manifest_names_only_files_of_its_folder(trained: Experiment, tmp_path, capsys):
    arguments = trained.copy_to(tmp_path / "run")
    for name in ("../../outside", "/etc/hostname", "a" * 5000):
        path = tmp_path / "run" / "dataset" / MANIFEST
        kept = path.read_text()
        write_json(path, with_own_hash({**json.loads(kept), "files": {name: "0" * 64}}))
        assert train.main(arguments) == 1
        assert ("is missing" if name.startswith("a") else "outside of") in capsys.readouterr().err
        path.write_text(kept)


def test_messages_do_not_steer_the_terminal(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text('"\\e[2J\\e]0;owned\\a": 1\n')
    assert preprocess.main(["--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said and "\x1b" not in said and "\a" not in said


def test_the_hubs_token_is_written_nowhere(prepared: Experiment, tmp_path):
    """All four scripts, each also failing with --debug, with a token in the environment."""
    run = tmp_path / "run"
    environment = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache")}
    arguments = prepared.arguments("--run_dir", str(run), "--training.max_steps", "2", "--training.evaluations", "1")
    nothing = {"preprocess.py": "--data.source", "evaluate.py": "--evaluation.generations"}
    for name in ("preprocess.py", "train.py", "generate.py", "evaluate.py"):
        bad = [nothing.get(name, "--model.name"), "nobody/nothing", "--debug"]
        for more, status in (([], 0), (bad, 1)):
            done = python(name, *arguments, *more, **environment)
            assert done.returncode == status and ("Traceback" in done.stderr) == bool(status), done.stderr
            assert TOKEN not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
