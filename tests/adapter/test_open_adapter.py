"""Which adapters generate.py takes: the run's own, ours from elsewhere, and those that PEFT made without us."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from children import small_disk
from experiment import Experiment
from given_adapters import NAMED, arguments, as_peft_saves, change
from hub_server import serving
from hub_state import Hub
from publishing_runs import ROOT, run, stopped_at_a_large_file
from safetensors.torch import load_file, save_file
from scripts import script

import generate
import preprocess
from kestrel.runtime.atomic import write_json


@pytest.fixture
def elsewhere(trained: Experiment, tmp_path: Path) -> Path:
    return as_peft_saves(trained, tmp_path / "elsewhere")


def double(folder: Path) -> None:
    """Doubles an adapter's weights."""
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)


def test_an_adapter_made_elsewhere_is_used_and_what_is_not_known_is_printed(
    trained: Experiment, elsewhere: Path, tmp_path: Path, capsys
) -> None:
    given = arguments(trained, tmp_path / "run", elsewhere, *NAMED)
    assert generate.main(given) == 0
    printed = capsys.readouterr().out
    assert "not proven: this adapter was not made by Kestrel" in printed and "proven: it computes" not in printed
    answers = (tmp_path / "run" / "generations" / "test.adapter.jsonl").read_bytes()
    # The same weights as the run's own adapter, so the same answers; and they belong to these weights from now on.
    assert generate.main(arguments(trained, tmp_path / "own", trained.run / "adapter")) == 0
    assert answers == (tmp_path / "own" / "generations" / "test.adapter.jsonl").read_bytes()
    double(elsewhere)
    capsys.readouterr()
    assert generate.main(given) == 0
    assert "up to date" not in capsys.readouterr().out


OTHER = {"base_model_name_or_path": "other/model"}


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (OTHER, [], "if that is a copy of other/model, add --hub.base_model other/model"),
        (OTHER, NAMED, "--model.name other/model"),
        ({"modules_to_save": ["lm_head"]}, NAMED, "modules_to_save"),
        ({"target_modules": ["no_such_layer"]}, NAMED, "query_key_value"),
        ({"target_modules": ["dense"]}, NAMED, "other layers than this base has"),
        ({"r": 8}, NAMED, "rank 8"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_what_to_do(
    trained: Experiment, elsewhere: Path, tmp_path: Path, capsys, changes: dict, more: list[str], message: str
) -> None:
    change(elsewhere, **changes)
    assert generate.main(arguments(trained, tmp_path / "run", elsewhere, *more)) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_base_that_is_only_a_path_is_noted_and_used(
    trained: Experiment, elsewhere: Path, tmp_path: Path, capsys
) -> None:
    change(elsewhere, base_model_name_or_path="/content/falcon")
    assert generate.main(arguments(trained, tmp_path / "run", elsewhere)) == 0
    assert "only shapes can be checked" in capsys.readouterr().err


def test_weights_that_lack_a_layer_are_refused(trained: Experiment, elsewhere: Path, tmp_path: Path, capsys) -> None:
    weights = elsewhere / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors[min(tensors)]
    save_file(tensors, weights)
    assert generate.main(arguments(trained, tmp_path / "run", elsewhere, *NAMED)) == 1
    assert "other layers than this base has" in capsys.readouterr().err


def test_another_prompt_than_the_adapters_is_refused_by_field(trained: Experiment, tmp_path: Path, capsys) -> None:
    given = arguments(trained, tmp_path / "run", trained.run / "adapter", "--prompt.format", "original")
    shutil.rmtree(tmp_path / "run")
    own = [word for word in given if word not in ("--generation.systems", "adapter")]
    assert preprocess.main(own) == 0 and generate.main(given) == 1
    said = capsys.readouterr().err
    assert "prompt.format: it was 'plain', now 'original'" in said and "prompt.format, then run preprocess.py" in said


def test_a_difference_of_lora_is_refused_for_the_runs_own_and_named_for_a_given_one(
    trained: Experiment, tmp_path: Path, capsys
) -> None:
    own = trained.copy_to(tmp_path / "own")
    assert generate.main([*own, "--lora.alpha", "64"]) == 1
    assert "lora.alpha: it was 8.0, now 64.0" in capsys.readouterr().err
    one = ["--generation.max_dialogues", "1", "--generation.systems", "adapter"]
    assert generate.main([*own, *one, "--lora.dropout", "0.3"]) == 0, "dropout has no part in inference"
    more = ["--lora.alpha", "64", "--lora.target_modules", "dense", "--lora.dropout", "0.3"]
    assert generate.main(arguments(trained, tmp_path / "run", trained.run / "adapter", *more)) == 0
    said = capsys.readouterr().err
    assert "lora.alpha: it was 8.0, now 64.0; the adapter's own value is used" in said and "lora.target_modules" in said
    assert "dropout" not in said


def test_a_part_of_our_adapter_is_not_taken_for_one_made_elsewhere(trained: Experiment, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "part"
    shutil.copytree(trained.run / "adapter", folder)
    (folder / "manifest.json").unlink()
    assert generate.main(arguments(trained, tmp_path / "run", folder)) == 1
    assert "without its manifest.json" in capsys.readouterr().err


def test_what_is_no_adapter_is_named_with_what_may_have_been_meant(
    trained: Experiment, elsewhere: Path, tmp_path: Path, capsys
) -> None:
    checkpoint = next((trained.run / "checkpoints").iterdir())
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.safetensors").write_bytes(b"")
    for name, message in (
        (trained.run, f"did you mean {trained.run / 'adapter'}?"),
        (trained.run / "dataset", "name a run's adapter folder"),
        (checkpoint, "is a checkpoint; name the adapter folder"),
        (tmp_path / "whole", "a whole model, which belongs in model.name"),
        (elsewhere / "adapter_config.json", "is a file; name its folder"),
    ):
        assert generate.main(arguments(trained, tmp_path / "run", name)) == 1
        assert message in capsys.readouterr().err


def test_a_damaged_one_is_refused_with_what_to_do(trained: Experiment, tmp_path: Path, capsys) -> None:
    cached = tmp_path / "models--me--lora"
    for folder, remedy in (
        (tmp_path / "copy", "copy it again"),
        (cached / "snapshots" / "0123", f"delete {cached} to download it again"),
    ):
        shutil.copytree(trained.run / "adapter", folder)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
        assert generate.main(arguments(trained, tmp_path / "run", folder)) == 1
        said = capsys.readouterr().err
        assert "is damaged or was edited" in said and remedy in said and "set the run's settings" not in said


def test_another_tools_manifest_does_not_make_an_adapter_ours(
    trained: Experiment, elsewhere: Path, tmp_path: Path, capsys
) -> None:
    write_json(elsewhere / "manifest.json", {"name": "an extension"})
    assert generate.main(arguments(trained, tmp_path / "run", elsewhere, *NAMED)) == 0
    assert "not made by Kestrel" in capsys.readouterr().out


def test_answers_of_another_adapter_are_not_scored_wherever_it_is_from(
    trained: Experiment, elsewhere: Path, tmp_path: Path, capsys
) -> None:
    evaluate = script("evaluate")
    given = arguments(trained, tmp_path / "run", elsewhere, *NAMED, "--evaluation.resamples", "100")
    assert generate.main(given) == 0 and evaluate.main(given) == 0
    capsys.readouterr()
    double(elsewhere)
    assert evaluate.main(given) == 1
    assert "was generated from another adapter than the run has now" in capsys.readouterr().err
    given[given.index(str(elsewhere))] = "someone/never-downloaded"
    assert evaluate.main(given) == 0
    assert "someone/never-downloaded is not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "a/b/c", "../x/y", "owner/"])
def test_what_is_neither_folder_nor_id_is_refused(trained: Experiment, tmp_path: Path, capsys, name: str) -> None:
    assert generate.main(arguments(trained, tmp_path / "run", name)) == 1
    assert "no such folder, and not an id on the Hub" in capsys.readouterr().err


def test_from_the_hub_only_safetensors_come(trained: Experiment, elsewhere: Path, tmp_path: Path) -> None:
    (elsewhere / "adapter_model.bin").write_bytes(b"pickle")
    (elsewhere / "training_args.bin").write_bytes(b"pickle")
    (elsewhere / "run_me.py").write_text("raise SystemExit")
    pickles = tmp_path / "pickles"
    shutil.copytree(elsewhere, pickles)
    (pickles / "adapter_model.safetensors").unlink()
    with serving() as hub:
        hub.add("someone/lora", elsewhere)
        hub.add("someone/pickles", pickles)
        hub.add("someone/secret", elsewhere, private=True)
        home = tmp_path / "home"
        given = arguments(trained, tmp_path / "run", "someone/lora", *NAMED)
        done = run("generate.py", *given, hub=hub, home=home, token=None)
        assert done.status == 0 and "not proven" in done.said, done.said
        asked = [request for request in hub.requests if "/resolve/" in request]
        assert {request.rpartition("/")[2] for request in asked} == {"adapter_config.json", "adapter_model.safetensors"}
        looking = tmp_path / "look.py"  # what generate.py asks for, in a process that imports no model
        looking.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom kestrel.errors import KestrelError\n"
            "from kestrel.adapter.source import download_adapter\nfor name in sys.argv[1:]:\n    try:\n"
            "        print(download_adapter(name))\n    except KestrelError as error:\n        print(error)\n"
        )
        names = ("someone/pickles", "someone/secret", "someone/lora@v9", "someone/absent", "someone/lora@main")
        done = run(str(looking), *names, hub=hub, home=home, token=None)
        pickles_said, secret, revision, absent, found = done.said.splitlines()
        assert "no adapter_model.safetensors at its top" in pickles_said and "no such revision" in revision
        assert "private and you are not logged in" in secret and "private and you are not logged in" in absent
        assert {path.name for path in Path(found).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert hub.wrong == []


def test_ctrl_c_in_the_middle_of_a_download_ends_it_and_the_same_command_continues(
    trained: Experiment, elsewhere: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.add("someone/lora", elsewhere)
    given, home = arguments(trained, tmp_path / "run", "someone/lora", *NAMED), tmp_path / "home"
    done = stopped_at_a_large_file("generate.py", *given, hub=hub, home=home)
    assert done.status == 130 and "run the same command again" in done.said and "Traceback" not in done.said, done.said
    assert run("generate.py", *given, hub=hub, home=home).status == 0


def test_a_full_disk_under_the_hubs_cache_is_named(
    trained: Experiment, elsewhere: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.add("someone/lora", elsewhere)
    given = arguments(trained, tmp_path / "run", "someone/lora", *NAMED)
    with small_disk(tmp_path / "disk", 8) as small:
        done = run("generate.py", *given, hub=hub, home=small)
    assert done.status == 1 and f"the Hub's cache, {small}" in done.said and "HF_HOME" in done.said, done.said


def test_the_original_projects_adapter_has_a_config(tmp_path: Path) -> None:
    """Its prompt is the one of its adapter, and its splits are those of the config that it is compared with."""
    from kestrel.config.resolve import resolve

    theirs, _ = resolve("configs/falcon-7b-original.yaml", {})
    ours, _ = resolve("configs/falcon-7b-cynaptics.yaml", {})
    assert theirs.prompt.format == "original" and theirs.model.adapter and theirs.model.name == ours.model.name
    assert (theirs.data, theirs.seed, theirs.prompt.max_length) == (ours.data, ours.seed, ours.prompt.max_length)
    assert theirs.generation == ours.generation
