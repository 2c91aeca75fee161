"""From a file and options to settings, and from whatever happens to an exit status and one message."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import python
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kestrel.config.keys import all_keys
from kestrel.config.resolve import _OTHER_NAMES, describe, resolve
from kestrel.config.settings import Settings
from kestrel.config.yaml_file import load_with_lines
from kestrel.errors import Interrupted, KestrelError, UsageError
from kestrel.runtime.command_line import _SECTIONS, run_script

MINIMAL = "run_dir: r\ndata:\n  source: s\nmodel:\n  name: m\n"
QUICK = hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def problems_of(tmp_path: Path, text: str | bytes, overrides: dict | None = None, unknown: tuple = ()) -> list[str]:
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        resolve(str(path), overrides or {}, unknown)
    except UsageError as error:
        return [problem.replace(f"{path}", "a.yaml") for problem in error.problems]
    return []


def run(main: Callable[..., None], *argv: str, options: tuple = ()) -> int:
    return run_script("script.py", "What it does.\n", main, list(argv), options)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL.replace("run_dir: r", f"run_dir: {tmp_path}/run"))
    return str(path)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["a.yaml: run_dir: is required and missing", "a.yaml: data.source: is required and missing",
              "a.yaml: model.name: is required and missing"]),
        ("- a\n- b\n", ["a.yaml:1: expected a mapping of sections, found list"]),
        ("just text", ["a.yaml:1: expected a mapping of sections, found str"]),
        (MINIMAL + "training:\n\tepochs: 1\n", ["a.yaml:7: not valid YAML: found character '\\t'"]),
        (MINIMAL + "seed: 1\nseed: 2\n", ["a.yaml:7: seed: given twice, first in line 6"]),
        (MINIMAL + "data:\n  format: auto\n", ["a.yaml:6: data: given twice, first in line 2"]),
        (MINIMAL + "trainng:\n  epochs: 1\n", ["a.yaml:6: trainng: unknown key; did you mean training?"]),
        (MINIMAL + "training:\n  learning_rte: 1\n",
         ["a.yaml:7: training.learning_rte: unknown key; did you mean training.learning_rate?"]),
        (MINIMAL + "training.epochs: 1\n",
         ["a.yaml:6: training.epochs: write it as a section: `training:`, and below it, indented, `epochs:`"]),
        (MINIMAL + "epochs: 1\n", ["a.yaml:6: epochs: unknown key; did you mean training.epochs?"]),
        (MINIMAL + "training: 3\n", ["a.yaml:6: training: expected a section with keys, found 3"]),
        (MINIMAL + "seed: one\n", ["a.yaml:6: seed: expected integer, found 'one'"]),
        (MINIMAL + "seed: 010\n", ["a.yaml:6: seed: expected integer, found '010'"]),
        (MINIMAL + "seed: 1:30\n", ["a.yaml:6: seed: expected integer, found '1:30'"]),
        (MINIMAL + "seed: 2024-01-01\n", ["a.yaml:6: seed: expected integer, found '2024-01-01'"]),
        (MINIMAL + "training: {learning_rate: '2e-4'}\n",
         ["a.yaml:6: training.learning_rate: expected number, found '2e-4'"]),
        (MINIMAL + "lora:\n  target_modules:\n    - a\n    - 7\n", ["a.yaml:7: lora.target_modules: expected list of text or auto|all-linear, found 7"]),
        (MINIMAL + "prompt:\n  max_length: 5\n",
         ["a.yaml:7: prompt.max_length: input should be greater than or equal to 16, found 5"]),
        (MINIMAL + "seed: !!python/name:os.getcwd x\n", ["a.yaml:6: not valid YAML"]),
        (MINIMAL + "? [a, b]\n: 1\n", ["a.yaml:6: a key must be a word, not a list or mapping"]),
        (MINIMAL + "seed: !!python/object/apply:os.getcwd []\n", ["a.yaml:6: seed: expected integer, found []"]),
        ("a: 1\n---\nb: 2\n", ["a.yaml:2: not valid YAML"]),
        ("a: &a [*a]\n", ["a.yaml"]),
        ("\x00\x01", ["a.yaml: not valid YAML"]),
        (b"\xff\xfe\x00binary", ["a.yaml: not UTF-8 text (byte 0)"]),
        ("a: " + "[" * 1000, ["a.yaml"]),
        (MINIMAL + "generation:\n  top_k: 7\n",
         ["a.yaml:7: generation.top_k: has no effect without generation.do_sample: true"]),
        (MINIMAL + "training:\n  # epochs: 3\nlora:\n", []),  # sections with everything commented out
    ],
)  # fmt: skip
def test_problems_of_a_file(tmp_path: Path, text: str | bytes, expected: list[str]) -> None:
    found = problems_of(tmp_path, text)
    for wanted in expected:
        assert any(problem.startswith(wanted) for problem in found), found
    assert all("\n" not in problem for problem in found) and len(found) <= 3 * len(expected)


def test_all_problems_at_once(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        "run_dir: r\nsead: 1\ndata:\n  format: csv\nmodel:\n  name: m\nquantization:\n  bits: 8\n  bits: 4\n",
        {"lora.r": "0", "training.epochs": None},
        ("--lora.alfa", "3", "stray"),
    )
    assert sorted(problem.partition(": ")[0] for problem in found) == [
        "'stray'", "--lora.alfa", "--lora.r", "--training.epochs", "a.yaml:2", "a.yaml:3", "a.yaml:4", "a.yaml:8", "a.yaml:9",
    ]  # fmt: skip


def test_yaml_aliases_that_expand_exponentially_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    began = time.monotonic()
    assert "values" in problems_of(tmp_path, "\n".join(lines))[0]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere.yaml", "no such file"), ("", "is a directory"), (".", "is a directory"), ("a\0b", "null byte"),
        ("x/y/z.yaml", "no such file"), ("falcon7b.yaml", "no such file or directory; did you mean falcon-7b.yaml?"),
    ],
)  # fmt: skip
def test_a_missing_file(tmp_path: Path, name: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "falcon-7b.yaml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve(name, {})
    (message,) = caught.value.problems
    assert problem in message


def test_numbers_and_text_keep_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "run_dir: 2024-01-01\ndata:\n  source: no\n  revision: 12e4567\nmodel:\n  name: 7\n  revision: 0012345\n"
        "training:\n  learning_rate: 2e-4\n  epochs: 3\n  weight_decay: 1.E-2\nlora:\n  alpha: 1_0\nseed: 0x10\n"
    )
    settings, _ = resolve(str(path), {"model.adapter": "123"})
    assert (settings.run_dir, settings.data.source, settings.data.revision) == ("2024-01-01", "no", "12e4567")
    assert (settings.model.name, settings.model.revision, settings.model.adapter) == ("7", "0012345", "123")
    training = settings.training
    assert (training.learning_rate, training.epochs, training.weight_decay) == (2e-4, 3, 0.01)
    assert (settings.lora.alpha, settings.seed) == (10, 16)


@QUICK
@given(value=st.text(max_size=20), key=st.sampled_from(sorted(all_keys())))
@example(value="0E0", key="evaluation.extra_metrics")
def test_any_option_gives_settings_or_problems(tmp_path_factory: pytest.TempPathFactory, value: str, key: str) -> None:
    path = tmp_path_factory.getbasetemp() / "minimal.yaml"
    path.write_text(MINIMAL)
    try:
        settings, origin = resolve(str(path), {key: [value] if all_keys()[key].takes_several else value})
    except UsageError as error:
        assert any(p.startswith((f"--{key}: ", "minimal")) or key.split(".")[0] in p for p in error.problems)
    else:
        assert origin[key] == f"--{key}"
        again = load_with_lines(describe(settings, origin), "x", {k for k, v in all_keys().items() if v.is_text})
        assert Settings.model_validate(again.value) == settings, "what --print-config shows can be read again"


# -- options -----------------------------------------------------------------------------------------------------------


def test_options(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Settings] = []
    status = run(
        lambda settings, options: seen.append(settings),
        *("--config", config, "--training.learning_rate", "2e-4", "--seed=7", "--generation.do_sample"),
        *("--evaluation.generations", "a b.jsonl", "2", "--training.report_to", "--lora.target_modules", "all-linear"),
        *("--model.revision", "1234567", "--generation.length_penalty", "null", "--data.both_sides", "no"),
        *("--generation.systems", "base", "--generation.stop_strings", "[]"),
    )
    assert status == 0, capsys.readouterr().err
    (settings,) = seen
    assert settings.training.learning_rate == 2e-4 and settings.seed == 7 and settings.generation.do_sample
    assert settings.evaluation.generations == ["a b.jsonl", "2"] and settings.training.report_to == []
    assert settings.lora.target_modules == "all-linear" and settings.model.revision == "1234567"
    assert settings.generation.length_penalty is None and settings.data.both_sides is False
    assert settings.generation.systems == ["base"] and settings.generation.stop_strings == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.learning_rat", "3"], "--training.learning_rat: unknown option; did you mean --training.learning_rate?"),
        (["--prnt-config"], "--prnt-config: unknown option; did you mean --print-config?"),
        (["--sho", "3"], "--sho: unknown option; did you mean --show?"),
        (["--seed"], "--seed: needs a value (integer)"),
        (["--seed", "["], "--seed: expected integer, found '['"),
        (["--seed", "a: b"], "--seed: expected integer, found {'a': 'b'}"),
        (["--run_dir", ""], "--run_dir: string should have at least 1 character, found ''"),
        (["--show", "many"], "argument --show: invalid int value: 'many'"),
        (["--training", "3"], "--training: unknown option"),
        (["--quantization.bits", "8"], "--quantization.bits: expected 4|16, found 8"),
        (["--generation.systems", "adapter", "gold"], "--generation.systems"),
        (["--nproc-per-node", "2"], "--nproc-per-node: an option of torchrun; it goes before the script's name"),
        (["--config_file", "x.yaml"], "--config_file: an option of accelerate launch; it goes before the script's name"),
        (["7"], "'7': an argument that belongs to no option"),
        (["my.yaml"], "'my.yaml': an argument that belongs to no option; did you mean --config my.yaml?"),
        (["README.md"], "answers to be scored by --evaluation.generations"),
    ],
)  # fmt: skip
def test_wrong_options(config: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def never(settings: object, options: object) -> None:
        raise AssertionError("it must not start")

    assert run(never, "--config", config, *argv, options=(("--show", {"type": int, "default": 0}),)) == 2
    written = capsys.readouterr()
    assert message in written.err and "Traceback" not in written.err and written.out == ""
    assert not Path(config).with_name("run").exists(), "nothing is made before the settings are valid"
    assert run(never) == 2
    written = capsys.readouterr()
    assert (
        "--config: needs a YAML file, such as configs/quickstart.yaml" in written.err and "required" not in written.err
    )


def test_print_config_marks_overrides(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda *_: 1 / 0, "--config", config, "--print-config", "--seed", "7") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  source: s  # {config}:3" in lines and "  max_length: 1024" in lines
    assert [line for line in lines if "overridden" in line] == ["seed: 7  # overridden on the command line"]


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("name", ["preprocess.py", "train.py", "generate.py", "evaluate.py", "publish.py", "chat.py"])
def test_help_lists_the_keys_that_the_script_uses_or_all(name: str, flag: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(name, "", lambda *_: None, [flag])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for dotted, key in all_keys().items():
        section = dotted.rpartition(".")[0]
        is_shown = flag == "--help-all" or not section or section in _SECTIONS[name]
        text = " ".join(f"{key.field.description} ({key.type_name}; {key.default})".split())
        assert (f"--{dotted} " in shown) == (text.replace(" ", "") in shown.replace(" ", "")) == is_shown, dotted
    for option in ("--config FILE", "--print-config", "--debug", "--help-all"):
        assert option in shown


@pytest.mark.parametrize(
    ("name", "key"),
    [("lr", "training.learning_rate"), ("training.batch", "training.batch_size"), ("lora_r", "lora.r"),
     ("epochs", "training.epochs"), ("lora.rank", "lora.r"), ("model-name-or-path", "model.name"),
     ("dataset", "data.source"), ("output_dir", "run_dir"), ("training.gradient_checkpointing", "training.recompute")],
)  # fmt: skip
def test_names_of_other_tools_are_understood(config: str, capsys: Any, name: str, key: str) -> None:
    assert run(lambda *_: None, "--config", config, f"--{name}", "1") == 2
    assert f"did you mean --{key}?" in capsys.readouterr().err


def test_every_name_of_another_tool_stands_for_a_key() -> None:
    assert _OTHER_NAMES.keys() <= all_keys().keys()


# -- the process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["preprocess.py", "train.py", "generate.py", "evaluate.py"])
def test_nothing_heavy_before_the_settings_are_valid(script: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MINIMAL + "sead: 1\n")
    code = f"""if True:
        import runpy, sys, time
        status = runpy.run_path({script!r})["main"](["--config", {str(tmp_path / "a.yaml")!r}])
        heavy = {{"torch", "transformers", "datasets", "numpy", "pyarrow", "peft"}} & set(sys.modules)
        print(status, sorted(heavy), time.process_time())
    """
    done = python("-c", code)
    status, heavy, seconds = done.stdout.split()
    assert (status, heavy) == ("2", "[]") and float(seconds) < 1.0
    assert "a.yaml:6: sead: unknown key; did you mean seed?" in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KestrelError("line 3 is broken; mend it"), 1, "script.py: line 3 is broken; mend it\n"),
        (Interrupted(15, "stopped at step 3"), 143, "stopped at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "f.bin"), 1, "the disk is full (f.bin)"),
        (PermissionError(errno.EACCES, "Permission denied", "f.bin"), 1, "no permission to write: f.bin"),
        (MemoryError(), 1, "lower training.tokens_per_step"),
        (ZeroDivisionError("odd"), 1, "unexpected ZeroDivisionError: odd\n  run it again with --debug"),
    ],
)
def test_exit_statuses(
    config: str, error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: object, options: object) -> None:
        raise error

    assert run(fail, "--config", config) == status
    written = capsys.readouterr().err
    assert message in written and "Traceback" not in written
    assert run(fail, "--config", config, "--debug") == status
    assert "Traceback" in capsys.readouterr().err


def test_the_run_keeps_its_settings_and_a_remedy_repeats_the_options(config: str, tmp_path: Path) -> None:
    said = []
    options = ["--seed", "3", "--lora.target_modules", "a b", "c"]
    assert run(lambda settings, arguments: said.append(arguments.again), "--config", config, *options) == 0
    assert said == [f"--config {config} --seed 3 --lora.target_modules 'a b' c"]
    expected, _ = resolve(config, {"seed": "3", "lora.target_modules": ["a b", "c"]})
    assert resolve(str(tmp_path / "run" / "config.yaml"), {})[0] == expected
