"""What trackers receive: TensorBoard's files are read back; mocks stand in for the others, which are not installed."""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import os
import socket
import sys
import typing
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from kestrel.config.resolve import resolve
from kestrel.config.settings import Tracker
from kestrel.errors import KestrelError
from kestrel.training.trackers import check_trackers, tracked_settings

FEW = ["--training.max_steps", "2", "--training.evaluations", "1", "--training.samples", "0"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user of this machine has set for trackers is not what is tested, and what a run sets does not stay."""
    for name in list(os.environ):
        if name.endswith(("_PROJECT", "_PROJECT_NAME", "_EXPERIMENT_NAME")) or name.startswith(("WANDB", "MLFLOW")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_tensorboard_is_the_default_and_needs_no_network(prepared, tmp_path, monkeypatch):
    def refuse(*address):
        raise AssertionError(f"a connection to {address[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert train.main([*prepared.copy_to(tmp_path / "run"), *FEW[:-1], "1"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"tensors": 0}).Reload()
    written = [json.loads(line) for line in (tmp_path / "run" / "logs" / "training.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        losses = {line["step"]: line[key] for line in written if key in line}
        assert losses and {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(losses)
    (text,) = events.Tensors("args/text_summary")
    received = json.loads(text.tensor_proto.string_val[0])
    (sample,) = (json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1:])
    shown = events.Tensors(f"samples/{sample['dialogue_id']}/text_summary")
    assert [event.step for event in shown] == [0, 2]
    assert f"reference: {sample['reference']}" in shown[-1].tensor_proto.string_val[0].decode()
    assert received["training.batch_size"] == 4 and received["lora.r"] == 4
    assert received["model.name"] == "base" and received["data.source"] == "corpus"
    assert not received.keys() & {"output_dir", "per_device_train_batch_size", "hub_token"}


def test_no_tracker_at_all(prepared, tmp_path):
    assert train.main([*prepared.copy_to(tmp_path / "run"), *FEW, "--training.report_to"]) == 0
    assert not list((tmp_path / "run" / "logs").glob("events*"))


def test_missing_trackers_are_named_with_their_packages_and_installed_ones_are_not(prepared, capsys, monkeypatch):
    """At once: nothing has been loaded, and nothing is written."""
    before = sorted(prepared.run.rglob("*"))
    assert train.main(prepared.arguments("--training.report_to", "mlflow", "tensorboard", "flyte")) == 1
    said = capsys.readouterr()
    assert "training.report_to: mlflow, flyte is not installed" in said.err
    assert "pip install mlflow flytekit, or leave it out" in said.err
    assert said.out == "" and sorted(prepared.run.rglob("*")) == before
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a, **k: None)
    monkeypatch.setattr("transformers.integrations.integration_utils._is_comet_installed", False, raising=False)
    monkeypatch.setattr("transformers.integrations.integration_utils._has_neptune", False)
    for name in typing.get_args(Tracker):
        with pytest.raises(KestrelError, match=f"training.report_to: {name} is not installed"):
            check_trackers([name])


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def tracked(request, prepared, tmp_path, monkeypatch) -> tuple[str, MagicMock, str]:
    """A tracker, the package that took its calls in a training, and the settings and configurations that it was sent."""
    name, package, sent = request.param, MagicMock(), []
    for module in (name, "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        stand_in = package if module == name else MagicMock()
        stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)
        stand_in.ConfigError = ValueError
        monkeypatch.setitem(sys.modules, module, stand_in)
    package.run, package.__version__ = None, "3.0.0"
    package.init.side_effect = lambda **arguments: setattr(package, "run", MagicMock())
    package.context_vars.current_space_id.get.return_value = None
    package.utils.validation.MAX_PARAM_VAL_LENGTH, package.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
    package.active_run.side_effect = itertools.chain([None], itertools.repeat(MagicMock()))
    # Written down at once: what is passed may change later.
    for call in (package.config.update, package.log_params):
        call.side_effect = lambda *arguments, **named: sent.append(repr((arguments, named)))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert train.main([*prepared.copy_to(tmp_path / "my-run"), *FEW, "--training.report_to", name]) == 0
    return name, package, " ".join(sent)


def test_a_tracker_gets_the_runs_name_and_its_settings(tracked):
    name, package, sent = tracked
    if name == "wandb":
        assert package.init.call_args.kwargs == {"project": "kestrel", "name": "my-run"}
        logged = {key for call in package.log.call_args_list for key in call.args[0]}
        assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/perplexity"} <= logged
    elif name == "trackio":  # it stays on this machine
        arguments = package.init.call_args.kwargs
        assert (arguments["project"], arguments["name"], arguments["space_id"]) == ("kestrel", "my-run", None)
        assert arguments["private"] is True
        assert not package.freeze.called and not package.sync.called and package.finish.called
    else:  # it takes every setting, and the user's experiment
        package.set_experiment.assert_called_once_with("mine")
        assert package.start_run.call_args.kwargs["run_name"] == "my-run"
        keys = [key for call in package.log_params.call_args_list for key in call.args[0]]
        # MLflow refuses names with other characters than these.
        assert all(key.replace(".", "").replace("_", "").isalnum() for key in keys)
    assert "'training.learning_rate': 0.01" in sent and "'lora.target_modules': ['query_key_value']" in sent
    assert "per_device_train_batch_size" not in sent


def test_no_tracker_sees_the_path_of_a_local_base(tracked, prepared, tmp_path):
    """By whatever way: the settings, the model's configuration or the adapter's."""
    name, _, sent = tracked
    assert "'_name_or_path': 'base'" in sent
    assert name == "mlflow" or "base_model_name_or_path='base'" in sent
    assert str(prepared.base.parent) not in sent and str(tmp_path) not in sent
    # What is saved names the base in full, so that peft finds it.
    saved = json.loads((tmp_path / "my-run" / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(prepared.base)


def test_of_local_paths_only_the_last_part_is_sent(prepared, tmp_path):
    def sent(**keys: str) -> dict[str, object]:
        return tracked_settings(resolve(str(prepared.config), {k.replace("__", "."): v for k, v in keys.items()})[0])

    secret = Path("home") / "someone" / "private" / "dialogues.jsonl"
    card = tmp_path / "ann.png"
    card.touch()
    paths = dict.fromkeys(("data__dataset", "prompt__chat_template", "training__init_adapter"), str(tmp_path / "x"))
    paths |= {"prompt__format": "chat", "data__persona": [str(card)]}
    of_paths = sent(data__source=str(secret), model__adapter=str(tmp_path / "adapter"), **paths)
    assert of_paths["data.source"] == "dialogues.jsonl" and of_paths["model.adapter"] == "adapter"
    assert str(tmp_path.parent) not in json.dumps(of_paths) and "someone" not in json.dumps(of_paths)
    assert sent(training__init_adapter="owner/a@v1")["training.init_adapter"] == "owner/a@v1"
    of_ids = sent(data__source="owner/persona-set", model__name="owner/falcon", training__resume="never")
    assert (of_ids["data.source"], of_ids["model.name"]) == ("owner/persona-set", "owner/falcon")
    assert of_ids["training.resume"] == "never" and of_ids["seed"] == 0
    assert not [key for key in of_ids if key.startswith(("hub.", "generation.", "evaluation.", "run_dir"))]
