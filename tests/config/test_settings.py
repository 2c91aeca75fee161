"""The keys themselves: what is valid, what is impossible together, and that shipped files and schema agree with them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from kestrel.config.conflicts import conflicts
from kestrel.config.keys import all_keys, as_yaml
from kestrel.config.resolve import resolve
from kestrel.config.settings import Settings, Tracker, json_schema
from kestrel.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
SMALLEST = {"run_dir": "r", "data": {"source": "s"}, "model": {"name": "m"}}


def settings_with(dotted: str, value: object) -> Settings:
    section, _, name = dotted.rpartition(".")
    changed = {section: {**SMALLEST.get(section, {}), name: value}} if section else {name: value}
    return Settings.model_validate(SMALLEST | changed)


def test_schema_is_current() -> None:
    assert (ROOT / "configs" / "schema.json").read_text(encoding="utf-8") == json_schema(), (
        "run `python -m kestrel.config.settings > configs/schema.json`"
    )


def test_schema_has_every_key_with_its_meaning() -> None:
    schema = json.loads(json_schema())
    for dotted in all_keys():
        node = schema
        for part in dotted.split("."):
            node = node["properties"][part]
            if "$ref" in node:
                node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        assert node["description"].endswith((".", ")")), dotted
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_valid_commented_and_point_to_the_schema(path: Path) -> None:
    resolve(str(path), {})
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    for line in text.splitlines():
        if re.match(r"\s*[\w.]+:\s*[^\s#]", line):
            assert re.search(r"\S +# \S", line), f"{path.name}: no comment in {line!r}"


def test_the_documented_names_exist() -> None:
    documented = """run_dir seed data.source data.format prompt.format prompt.max_length model.name model.revision
        model.adapter model.trust_remote_code quantization.bits quantization.type quantization.double_quant
        quantization.compute_dtype lora.r lora.alpha lora.dropout lora.target_modules training.epochs training.max_steps
        training.learning_rate training.resume training.tokens_per_step training.report_to generation.split
        generation.max_new_tokens generation.do_sample generation.num_beams generation.candidates
        evaluation.generations evaluation.normalization evaluation.resamples evaluation.extra_metrics"""
    assert set(documented.split()) <= set(all_keys())


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("generation.temperature", 0.7),
        ("generation.top_p", 0.9),
        ("generation.top_k", 5),
        ("generation.length_penalty", 1.5),
        ("generation.max_new_tokens", 1024),
        ("generation.systems", []),
        ("generation.systems", ["base", "base"]),
        ("generation.stop_strings", ["\n", ""]),
        ("lora.target_modules", []),
        ("data.test_fraction", 0.96),
        ("training.early_stopping", 4),
    ],
)
def test_impossible_combinations(dotted: str, value: object) -> None:
    assert conflicts(Settings.model_validate(SMALLEST)) == []
    assert [key for key, _ in conflicts(settings_with(dotted, value))] == [dotted]


def test_sampling_and_beams() -> None:
    def problems(**generation: object) -> list[str]:
        return [key for key, _ in conflicts(Settings.model_validate({**SMALLEST, "generation": generation}))]

    assert problems(do_sample=True, temperature=0.7, top_p=0.9, top_k=5) == []
    assert problems(num_beams=4, length_penalty=0.6) == []
    assert problems(do_sample=True, num_beams=2) == ["generation.num_beams"]
    assert problems(candidates=True) == problems(references=False) == []
    assert problems(candidates=True, references=False) == ["generation.candidates"]


@pytest.mark.parametrize(
    ("file", "options", "key"),
    [
        ("quantization: {bits: 16, type: fp4}", {}, "quantization.type"),
        ("quantization: {bits: 16, double_quant: false}", {}, "quantization.double_quant"),
        ("quantization: {bits: 16}\ntraining: {recompute: dense}", {}, "training.recompute"),
        ("", {"quantization.bits": "16", "quantization.type": "nf4"}, "quantization.type"),
        ("quantization: {type: nf4, double_quant: true}", {"quantization.bits": "16"}, None),
        ("", {"model.name": ".", "model.revision": "main"}, "model.revision"),
        ("", {"model.revision": "main"}, None),
        ("training: {max_steps: 5}", {"training.epochs": "2"}, "training.epochs"),
        ("training: {max_steps: 5, epochs: 2}", {}, None),
        ("training: {epochs: 2}", {"training.max_steps": "5"}, None),
        ("", {"model.adapter": "a/b", "generation.systems": ["base"]}, "model.adapter"),
        ("", {"model.adapter": "a/b", "evaluation.generations": ["f"]}, "model.adapter"),
        ("", {"model.adapter": "a/b", "evaluation.compare": ["a", "b"]}, "model.adapter"),
        ("", {"model.adapter": "a/b", "evaluation.compare": ["r", "b"]}, None),
        ("", {"generation.split": "train", "evaluation.generations": ["f"]}, "generation.split"),
    ],
)
def test_what_another_key_makes_useless(tmp_path: Path, file: str, options: dict, key: str | None) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: r\ndata: {{source: s}}\nmodel: {{name: m}}\n{file}\n")
    if key is None:
        resolve(str(path), options)
    else:
        with pytest.raises(UsageError, match=f"{re.escape(key)}: .*has no effect") as caught:
            resolve(str(path), options)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("dotted", "wrong"),
    [
        ("run_dir", ["", 3, None]),
        ("seed", [-1, 1.5, "1", True]),
        ("data.source", [""]),
        ("data.validation_fraction", [-0.1, 1.0, float("nan"), float("inf"), "0.1"]),
        ("data.format", ["Parlai", 1]),
        ("prompt.max_length", [15, 1e3]),
        ("quantization.bits", [8, "4", 4.5, True]),
        ("quantization.double_quant", [1, "true"]),
        ("lora.r", [0]),
        ("lora.target_modules", ["all", [1], "query_key_value"]),
        ("training.learning_rate", [0, -1e-4, "2e-4"]),
        ("training.report_to", [["tensorbord"], "wandb"]),
        ("generation.top_p", [0, 1.1]),
        ("generation.persona_orders", [0, 2.0, True]),
        ("evaluation.resamples", [99]),
    ],
)
def test_wrong_values(dotted: str, wrong: list[object]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=re.escape(dotted.rpartition(".")[2])):
            settings_with(dotted, value)


def test_trackers_are_the_librarys() -> None:
    """Read from its source: importing it takes seconds."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "integrations" / "integration_utils.py"
    tables = [
        node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK"
    ]
    assert isinstance(tables[0], ast.Dict)
    assert sorted(get_args(Tracker)) == sorted(ast.literal_eval(key) for key in tables[0].keys if key)


@pytest.mark.parametrize(
    "value", [None, True, "null", "1234567", "a, b", "[x]", "\n", "it's", "ü: #", [], ["\n", "a, b", "]"], 2e-4, 1e-5, 3, "x " * 999]
)  # fmt: skip
def test_values_on_one_line_read_back(value: object) -> None:
    line = as_yaml(value)
    assert "\n" not in line
    assert yaml.safe_load(f"key: {line}  # a note")["key"] == (value if value != 1e-5 else pytest.approx(1e-5))


def refused(path: Path, **overrides: object) -> str:
    """What is said about settings, within two seconds."""
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        resolve(str(path), {name.replace("__", "."): value for name, value in overrides.items()})
    assert time.process_time() - began < 2
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("dotted", all_keys())
def test_no_key_takes_what_is_beyond_reason(tmp_path: Path, dotted: str) -> None:
    path, key = tmp_path / "a.yaml", all_keys()[dotted]
    path.write_text("run_dir: r\ndata: {source: s}\nmodel: {name: m}\n")
    values = ["a\0b", "\ud800", "x" * 5000] if dotted != "generation.stop_strings" else ["\ud800", "x" * 5000]
    if not key.is_text and not key.takes_several:
        values += ["1e300", "-1e300", "9" * 4000, ".nan", "{a: 1}"]
    for value in values:
        message = refused(path, **{dotted: [value] if key.takes_several else value})
        assert dotted in message and len(message) < 1000, message


def test_paths_that_no_script_could_use_are_refused_by_key(tmp_path: Path) -> None:
    path, pipe, file = tmp_path / "a.yaml", tmp_path / "pipe", tmp_path / "file"
    path.write_text("run_dir: r\ndata: {source: s}\nmodel: {name: m}\n")
    os.mkfifo(pipe)
    file.touch()
    one = ("run_dir", "data.source", "model.name", "model.adapter", "training.resume", "prompt.chat_template")
    for key in (*one, "evaluation.output", "evaluation.nli"):
        for bad in (pipe, "/dev/zero", f"folder/{'ü' * 200}"):
            assert f"--{key}: {str(bad)[:20]}" in refused(path, **{key: str(bad)})
    for key in ("evaluation.generations", "evaluation.judgements", "evaluation.compare", "data.persona"):
        assert f"--{key}: {pipe} is a pipe" in refused(path, **{key: [str(pipe)]})
    assert f"--run_dir: {file} is a file" in refused(path, run_dir=str(file))
    assert f"--run_dir: {file / 'run'} is below a file" in refused(path, run_dir=str(file / "run"))
    assert "a pipe to which nobody writes" in refused(pipe)
    assert "file name too long" in refused(Path("/".join("x" * 2500)))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 0x" + "f" * 5000,
        "a: x\n" * 2_000_000,
        "- a\n" * 20_000,
        "[" + "a," * 130_000,
        'a: "' + "\\x41" * 60_000,
        "{" * 5_000,
    ],
)
def test_files_that_are_no_experiment_are_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert str(path) in refused(path)


def test_a_file_from_another_command_is_read(tmp_path: Path) -> None:
    command = "import sys; from kestrel.config.resolve import resolve; print(resolve(sys.argv[1], {})[0].run_dir)"
    text = "run_dir: piped\ndata: {source: s}\nmodel: {name: m}\n"
    script = f'{sys.executable} -c "{command}" <(sleep 0.2; printf "{text}")'
    done = subprocess.run(["bash", "-c", script], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "piped\n", done.stderr
