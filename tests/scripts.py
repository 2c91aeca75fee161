"""The scripts as tests run them: in this process, by path, or until they are made to die."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from kestrel.generation.files import order_in_name
from kestrel.model.loss import token_nll
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import sha256_of
from kestrel.training import callbacks

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    """A script of the repository, by path: `import evaluate` might be the library of that name."""
    if name != "evaluate":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("kestrel_evaluate", ROOT / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands_in(block: str) -> list[str]:
    """The commands of a page's bash block, one a line; a loop as bash would run it, with nothing run."""
    if "\ndone" in block:
        say = """python() { printf python; for word; do [[ $word == *[\\ \\"]* ]] && word="'$word'"; printf ' %s' "$word"; done; echo; }"""
        done = subprocess.run(["bash", "-c", f"{say}\n{block}"], capture_output=True, text=True, check=True)
        block = done.stdout
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the ones that say who ran last."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name not in ("config.yaml", ".lock")}


class Killed(Exception):
    """Stands for a kill, in a run that goes on in this process."""


def die_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int | None = None) -> None:
    """Ends the next run, or sends it a signal, in the given step, before that step's log and checkpoint."""
    own = callbacks.Guard.on_optimizer_step

    def end(self, args, state, control, **extra):
        own(self, args, state, control, **extra)
        if state.global_step + 1 == step:
            if number is not None:
                return signal.raise_signal(number)
            raise Killed
        return None

    monkeypatch.setattr(callbacks.Guard, "on_optimizer_step", end)


def worsen(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Lets each validation loss after step 0 and the given number of evaluations be a nat worse than it is."""
    evaluations = []

    def nll(model, batch):
        if not model.training:  # two short dialogues, so an evaluation is one pass
            evaluations.append(None)
        return token_nll(model, batch) + max(0, len(evaluations) - after - 1)

    monkeypatch.setattr("kestrel.training.objective.token_nll", nll)


def make_run(folder: Path, dialogues: int = 12) -> Path:
    """A run with generations of an adapter that often says the reference and of a base that never does."""
    generator = random.Random(5)
    words = ["i", "you", "a", "like", "love", "dogs", "cats", "music"]
    words += ["very", "much", "and", "my", "two", "work", "play"]

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(4, 9))) + " ."

    files: dict[str, list[dict]] = {"adapter": [], "base": []}
    of_system = {"adapter": {"stopped_by": "eos", "reference_nll": 9.0}}
    of_system["base"] = {"stopped_by": "length", "reference_nll": 20.0}
    for d in range(dialogues):
        history: list[dict[str, str]] = []
        for turn in (1, 3, 5):
            history.append({"speaker": "partner", "text": text()})
            reference = text()
            of_reply = {"dialogue_id": f"d{d}", "turn": turn, "history": list(history), "reference": reference}
            for name, rows in files.items():
                persona = [text(), text()]
                response = reference if name == "adapter" and generator.random() < 0.6 else text()
                made = {"persona": persona, "response": response, "response_tokens": 8, "reference_tokens": 7}
                rows.append({**of_reply, **made, **of_system[name]})
            history.append({"speaker": "self", "text": reference})
    for name, rows in files.items():
        write_rows(folder / "run" / "generations" / f"test.{name}.jsonl", rows)
    record(folder / "run" / "generations")
    config = folder / "experiment.yaml"
    config.write_text(f"run_dir: {folder / 'run'}\ndata:\n  source: x/y\nmodel:\n  name: x/y\n", encoding="utf-8")
    return config


def record(folder: Path) -> None:
    """The manifest that generate.py leaves beside its files."""
    facts = {}
    for path in folder.glob("*.jsonl"):
        order = order_in_name(path.stem)[1]
        facts[path.name] = {"sha256": sha256_of(path), "made_from": {"persona_order": order} if order else {}}
    entries = {"kind": "generations", "schema_version": 1, "settings": {}, "made_from": {}, "files": {}}
    write_json(folder / "manifest.json", {**entries, "generations": facts})


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_metrics(config: Path, folder: str = "evaluation") -> dict:
    return json.loads((config.parent / "run" / folder / "metrics.json").read_text(encoding="utf-8"))
