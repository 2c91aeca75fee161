"""What the tests share: a quiet, offline, single-threaded process, and one small experiment that went through."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Before torch is imported: a second thread on a busy machine makes tiny models ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels run without a GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"

# Tests send Ctrl-C to scripts. Started in the background (`make test &`) they would hand down that it is to be ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from experiment import Experiment
from hub_server import serving
from hub_state import Hub
from make_models import AdaptedModels, write_base, write_config, write_corpus


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a tiny Falcon) and corpus/ (a miniature one)."""
    folder = tmp_path_factory.mktemp("assets")
    write_base(folder / "base")
    write_corpus(folder / "corpus", dialogues=16, candidates=True)
    return folder


@pytest.fixture(scope="session")
def prepared(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment after preprocess.py. Read it, or copy it; never write into it."""
    import preprocess

    folder = tmp_path_factory.mktemp("prepared")
    config = write_config(folder / "config.yaml", assets / "base", assets / "corpus", folder / "run")
    experiment = Experiment(config, folder / "run", assets / "base", assets / "corpus")
    assert preprocess.main(experiment.arguments()) == 0
    return experiment


@pytest.fixture(scope="session")
def trained(prepared: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment after train.py. Read it, or copy it; never write into it."""
    import train

    run = tmp_path_factory.mktemp("trained") / "run"
    assert train.main(prepared.copy_to(run)) == 0
    config = write_config(run.parent / "config.yaml", prepared.base, prepared.source, run)
    return Experiment(config, run, prepared.base, prepared.source)


@pytest.fixture(scope="session")
def evaluated(trained: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment after evaluate.py. Read it, or copy it; never write into it."""
    from scripts import script

    folder = tmp_path_factory.mktemp("evaluated")
    arguments = trained.copy_to(folder / "run")
    for name in ("generate", "evaluate"):
        assert script(name).main([*arguments, "--evaluation.resamples", "100"]) == 0
    config = write_config(folder / "config.yaml", trained.base, trained.source, folder / "run")
    return Experiment(config, folder / "run", trained.base, trained.source)


@pytest.fixture
def hub(prepared: Experiment) -> Iterator[Hub]:
    """A Hub on loopback that holds the experiment's base and nothing else."""
    with serving() as served:
        served.add("tiny/falcon", prepared.base)
        yield served
        assert served.wrong == []


@pytest.fixture(scope="session")
def models() -> Mapping[str, Any]:
    """Models with an adapter that does something, by architecture, each made when a test asks for it."""
    return AdaptedModels()
