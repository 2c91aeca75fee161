"""What trackers are told: TensorBoard's files are read back; the others, which are not installed, are stood in for."""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import os
import socket
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from kestrel.config.resolve import resolve
from kestrel.config.settings import Tracker
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
    assert train.main([*prepared.copy_to(tmp_path / "run"), *FEW]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"tensors": 0}).Reload()
    written = map(json.loads, (tmp_path / "run" / "logs" / "training.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in written if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(losses)
    assert len(events.Scalars("eval/loss")) == 1
    (text,) = events.Tensors("args/text_summary")
    told = json.loads(text.tensor_proto.string_val[0])
    assert told["training.batch_size"] == 4 and told["lora.r"] == 4
    assert told["model.name"] == "base" and told["data.source"] == "corpus"
    assert not told.keys() & {"output_dir", "per_device_train_batch_size", "hub_token"}


def test_no_tracker_at_all(prepared, tmp_path):
    assert train.main([*prepared.copy_to(tmp_path / "run"), *FEW, "--training.report_to"]) == 0
    assert not list((tmp_path / "run" / "logs").glob("events*"))


@pytest.mark.parametrize("name", typing.get_args(Tracker))
def test_a_missing_tracker_is_named_with_its_package(name, prepared, capsys, monkeypatch):
    """At once: nothing has been loaded, and nothing is written."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a, **k: None)
    monkeypatch.setattr("transformers.integrations.integration_utils._is_comet_installed", False, raising=False)
    monkeypatch.setattr("transformers.integrations.integration_utils._has_neptune", False)
    before = sorted(prepared.run.rglob("*"))
    assert train.main(prepared.arguments("--training.report_to", name)) == 1
    said = capsys.readouterr()
    package = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
    assert f"training.report_to: {name} is not installed" in said.err
    assert f"pip install {package.get(name, name)}, or leave it out" in said.err
    assert said.out == "" and sorted(prepared.run.rglob("*")) == before


def test_every_missing_one_is_named_and_those_that_are_there_are_not():
    with pytest.raises(Exception, match=r"report_to: mlflow, flyte is not .* pip install mlflow flytekit, or"):
        check_trackers(["mlflow", "tensorboard", "flyte"])
    check_trackers(["tensorboard"])
    check_trackers([])


def stand_in(monkeypatch: pytest.MonkeyPatch, *names: str) -> MagicMock:
    """A package that takes every call and remembers it."""
    package = MagicMock()
    for name in names:
        module = package if name == names[0] else MagicMock()
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, typing.cast(ModuleType, module))
    return package


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[MagicMock]:
    package = stand_in(monkeypatch, "wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")
    sys.modules["wandb.sdk.lib.config_util"].ConfigError = ValueError  # type: ignore[attr-defined]
    package.run, began = None, MagicMock()
    package.init.side_effect = lambda **arguments: setattr(package, "run", began)
    yield package


def test_wandb(wandb, prepared, tmp_path):
    assert train.main([*prepared.copy_to(tmp_path / "my-run"), *FEW, "--training.report_to", "wandb"]) == 0
    assert wandb.init.call_args.kwargs == {"project": "kestrel", "name": "my-run"}
    (config,) = wandb.config.update.call_args.args
    assert config["training.learning_rate"] == 1e-2 and config["quantization.type"] == "nf4"
    assert "per_device_train_batch_size" not in config
    logged = {key for call in wandb.log.call_args_list for key in call.args[0]}
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/perplexity"} <= logged


def test_trackio_stays_on_this_machine(prepared, tmp_path, monkeypatch):
    trackio = stand_in(monkeypatch, "trackio")
    trackio.context_vars.current_space_id.get.return_value = None
    assert train.main([*prepared.copy_to(tmp_path / "my-run"), *FEW, "--training.report_to", "trackio"]) == 0
    arguments = trackio.init.call_args.kwargs
    assert (arguments["project"], arguments["name"], arguments["space_id"]) == ("kestrel", "my-run", None)
    assert arguments["private"] is True
    assert not trackio.freeze.called and not trackio.sync.called and trackio.finish.called


def test_mlflow_takes_every_setting_and_the_users_experiment(prepared, tmp_path, monkeypatch):
    mlflow = stand_in(monkeypatch, "mlflow")
    mlflow.__version__ = "3.0.0"
    mlflow.utils.validation.MAX_PARAM_VAL_LENGTH, mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
    mlflow.active_run.side_effect = itertools.chain([None], itertools.repeat(MagicMock()))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert train.main([*prepared.copy_to(tmp_path / "my-run"), *FEW, "--training.report_to", "mlflow"]) == 0
    mlflow.set_experiment.assert_called_once_with("mine")
    assert mlflow.start_run.call_args.kwargs["run_name"] == "my-run"
    sent = {key: value for call in mlflow.log_params.call_args_list for key, value in call.args[0].items()}
    assert sent["training.max_steps"] == 2 and sent["lora.target_modules"] == ["query_key_value"]
    # MLflow refuses names with other characters than these.
    assert all(name.replace(".", "").replace("_", "").isalnum() for name in sent)


def remembering(call: Any) -> Any:
    """A call of a stand-in that writes down its arguments at once: what is handed over may change later."""
    return lambda *arguments, **named: call(repr((arguments, named)))


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_no_tracker_sees_where_a_local_base_lies(name, prepared, tmp_path, monkeypatch):
    """By whatever way: the settings, the model's configuration or the adapter's."""
    package = stand_in(monkeypatch, name, "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")
    seen: list[str] = []
    if name == "wandb":
        sys.modules["wandb.sdk.lib.config_util"].ConfigError = ValueError  # type: ignore[attr-defined]
        package.run = MagicMock()
        package.config.update.side_effect = remembering(seen.append)
    elif name == "trackio":
        package.context_vars.current_space_id.get.return_value = None
        package.config.update.side_effect = remembering(seen.append)
    else:
        package.__version__ = "3.0.0"
        package.utils.validation.MAX_PARAM_VAL_LENGTH, package.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 6000, 100
        package.active_run.side_effect = itertools.chain([None], itertools.repeat(MagicMock()))
        package.log_params.side_effect = remembering(seen.append)
    run = tmp_path / "run"
    assert train.main([*prepared.copy_to(run), *FEW, "--training.report_to", name]) == 0
    told = " ".join(seen)
    assert "'_name_or_path': 'base'" in told
    assert name == "mlflow" or "base_model_name_or_path='base'" in told
    assert str(prepared.base.parent) not in told and str(tmp_path) not in told
    # What is saved names the base in full, so that peft finds it.
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(prepared.base)


def test_of_local_paths_only_the_last_part_is_told(prepared, tmp_path):
    def told(**keys: str) -> dict[str, object]:
        return tracked_settings(
            resolve(str(prepared.config), {key.replace("__", "."): value for key, value in keys.items()})[0]
        )

    secret = Path("home") / "someone" / "private" / "dialogues.jsonl"
    of_paths = told(data__source=str(secret), model__adapter=str(tmp_path / "adapter"))
    assert of_paths["data.source"] == "dialogues.jsonl" and of_paths["model.adapter"] == "adapter"
    assert str(tmp_path.parent) not in json.dumps(of_paths) and "someone" not in json.dumps(of_paths)
    of_ids = told(data__source="owner/persona-set", model__name="owner/falcon", training__resume="never")
    assert (of_ids["data.source"], of_ids["model.name"]) == ("owner/persona-set", "owner/falcon")
    assert of_ids["training.resume"] == "never" and of_ids["seed"] == 0
    assert not [key for key in of_ids if key.startswith(("hub.", "generation.", "evaluation.", "run_dir"))]
