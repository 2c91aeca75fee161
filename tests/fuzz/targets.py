"""What is fuzzed: a function for each kind of input, which takes bytes.

Input that makes no sense must raise a `KestrelError`. Anything else is a bug: another exception, a dialogue that breaks
what `kestrel.dialogue` promises, settings that do not read back, an undefined exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_corpora

from kestrel.config.settings import Data
from kestrel.data.corpus import open_corpus
from kestrel.data.formats.recognize import FORMATS
from kestrel.data.read_counts import ReadCounts
from kestrel.data.splits import Splitter
from kestrel.errors import KestrelError

# What the tiny run of `artifacts` was made with, by its own account.
IDENTITY = {"format": "plain", "sha256": "0" * 64}
MEANING = {"dataset": "d", "seed": 0}
BASE = {"files": {"config.json": "1" * 64}}
QUANTIZATION = {"bits": 4, "type": "nf4"}
FILES = ("manifest.json", "prompt.json", "trainer_state.json", "training.jsonl", "adapter_config.json")


@cache
def folder() -> Path:
    """Where the inputs become files: in memory where the system has such a place."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="kestrel-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _file(name: str, content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(content)
    return path


def corpus(data: bytes, format: str) -> None:
    """A source of dialogues: recognized, read, split."""
    path = make_corpora.write(folder(), data, "source")
    source = open_corpus(Data(source=path, format=format, **make_corpora.EXPORTS))
    for split in source.splits:
        make_corpora.read(path, format, split, **make_corpora.EXPORTS)  # checks what it reads
    with contextlib.suppress(KestrelError):  # three dialogues need not be enough for three splits
        cut = Splitter(source, validation_fraction=0.3, test_fraction=0.3)
        for split in cut.splits:
            assert list(cut.read(split, ReadCounts()))


def config(data: bytes) -> None:
    """A YAML file; settings that hold are described, and the description reads back to them."""
    from kestrel.config.resolve import describe, resolve

    settings, origin = resolve(str(_file("config.yaml", data)), {})
    described = _file("described.yaml", describe(settings, origin).encode())
    assert resolve(str(described), {})[0] == settings


def options(data: bytes) -> None:
    """Arguments, one a line, in front of a sound YAML file, through the whole command line."""
    from kestrel.runtime.command_line import run_script

    sound = _file("sound.yaml", b"run_dir: r\ndata: {source: s}\nmodel: {name: m}\n")
    argv = [argument.decode("utf-8", "surrogateescape") for argument in data.split(b"\n")]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run_script("fuzz.py", "", _nothing, [*argv, "--print-config", "--config", str(sound)])
        except SystemExit as exit:
            status = exit.code  # --help
        err.flush()
    said = err.buffer.getvalue().decode()
    assert status in (0, 2), said
    assert all(line.isprintable() for line in said.split("\n")), said


def _nothing(*arguments: Any) -> None:
    raise AssertionError("--print-config stops before the script's own steps")


def artifacts(data: bytes) -> None:
    """The files of a run folder, as one JSON object: name -> content. All that reads them, tries."""
    from kestrel.adapter.open import read_adapter
    from kestrel.data import dataset
    from kestrel.evaluation.provenance import check_provenance
    from kestrel.generation.files import GenerationsFile
    from kestrel.runtime.manifest import identity_of, read_manifest
    from kestrel.runtime.training_log import read_log
    from kestrel.training import callbacks, checkpoints

    run = folder() / "run"
    shutil.rmtree(run, ignore_errors=True)
    artifact = run / "checkpoint-1"
    artifact.mkdir(parents=True)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    raw = {"manifest.json": data.decode("utf-8", "surrogateescape")}
    content = content if isinstance(content, dict) else raw
    for name, value in content.items():
        if name in FILES:
            text = value if isinstance(value, str) else json.dumps(value)
            (artifact / name).write_bytes(
                text.encode("utf-8", "surrogateescape" if content is raw else "surrogatepass")
            )
    (artifact / "test.adapter.jsonl").write_bytes(b"")
    for name in ("dataset", "generations", "adapter", "checkpoint-2"):
        (run / name).symlink_to(artifact)
    log = artifact / "training.jsonl"
    expected = {"prompt": IDENTITY, "quantization": QUANTIZATION, "base": BASE}
    readers: list[Callable[[], object]] = [
        *(partial(read_manifest, artifact, kind, "mend it") for kind in ("dataset", "adapter", "generations")),
        lambda: identity_of(read_manifest(artifact, "dataset", "mend it", check_files=False)),
        lambda: dataset.open_dataset(_settings(run), _prompt(), "preprocess"),
        lambda: read_adapter(artifact, expected, "train", "train"),
        lambda: checkpoints.choose("auto", run, MEANING, "train"),
        lambda: checkpoints.choose(str(artifact), run, MEANING, "train"),
        lambda: callbacks.evaluations_without_progress(checkpoints.log_history(artifact)),
        lambda: check_provenance(run, artifact, [run / "generations" / "test.adapter.jsonl"], "generate", {}),
        lambda: GenerationsFile(run / "generations" / "test.adapter.jsonl", "adapter", 0, {}).is_up_to_date(),
        lambda: read_log(log),
    ]
    for read in readers:
        with contextlib.suppress(KestrelError):
            read()


def _settings(run: Path) -> Any:
    from kestrel.config.settings import Data, Model, Settings

    return Settings(run_dir=str(run), data=Data(source="s"), model=Model(name="m"))


def _prompt() -> Any:
    return SimpleNamespace(identity=lambda: IDENTITY)


def adapter_config(data: bytes) -> None:
    """A foreign adapter_config.json: refused, or plain LoRA of the kind that Kestrel writes."""
    from kestrel.adapter.lora import adapter_config as read_config

    _file("adapter_config.json", data)
    read = read_config(folder())
    assert read.peft_type == "LORA" and read.r >= 1 and 0 <= read.lora_dropout < 1
    assert not (read.megatron_config or read.auto_mapping or read.layer_replication or read.modules_to_save)


def generations(data: bytes) -> None:
    """A generation file, alone and beside a sound one."""
    from kestrel.evaluation.alignment import align
    from kestrel.evaluation.generations import read_generations

    sound = _file("test.sound.jsonl", b'{"reference": "a b", "response": "b"}\n{"reference": "c", "response": ""}\n')
    read = read_generations(_file("test.other.jsonl", data))
    assert read.replies and len({reply.key for reply in read.replies}) == len(read.replies)
    with contextlib.suppress(KestrelError):
        files, _ = align([read_generations(sound), read])
        assert len({file.system for file in files}) == len(files)


def evaluation(data: bytes) -> None:
    """A generation file that can be read, scored and reported."""
    from kestrel.config.settings import Evaluation
    from kestrel.evaluation.alignment import align
    from kestrel.evaluation.generations import read_generations
    from kestrel.evaluation.report import as_html, as_markdown
    from kestrel.evaluation.sample_dialogues import sample_dialogues
    from kestrel.evaluation.scoring import evaluate_files
    from kestrel.evaluation.tables import summary

    files, notes = align([read_generations(_file("test.other.jsonl", data))])
    result = evaluate_files(files, notes, Evaluation(resamples=100), 0, None)
    json.dumps(result.metrics, allow_nan=False).encode("utf-8")
    "".join(text for text, _ in summary(result.metrics)).encode("utf-8")
    dialogues = sample_dialogues(result, 10, 0)
    as_html(result, [], dialogues).encode("utf-8")
    as_markdown(result, [], dialogues).encode("utf-8")


KEY = {"sheet": "s", "systems": ["a", "b"], "items": {"1": {"dialogue_id": "d", "turn": 1, "left": "a"}}}


def judgements(data: bytes) -> None:
    """A filled-in sheet, as JSON or as CSV."""
    from kestrel.evaluation.judgements import CHOICES, read_judgements

    name = "judged.json" if data.lstrip()[:1] in (b"{", b"[", b"") else "judged.csv"
    for judge, item, choice in read_judgements([_file(name, data)], KEY):
        assert judge.encode() and item in KEY["items"] and choice in CHOICES


def partial_generations(data: bytes) -> None:
    """What a killed generate.py left behind a header that still fits."""
    from kestrel.generation.answers import _keep_complete_shards

    rows: Any = range(64)
    header = json.dumps({"identity": "i", "dialogues": 64}).encode() + b"\n"
    path = _file(".test.adapter.jsonl.partial", header + data)
    done = _keep_complete_shards(path, "i", rows)
    kept = path.read_bytes()
    assert 0 <= done <= 64 and (header + data).startswith(kept)
    assert (kept == header) == (done == 0) and kept.endswith(b"\n")
    assert _keep_complete_shards(path, "i", rows) == done and path.read_bytes() == kept


def prompt(data: bytes) -> None:
    """Any text as persona and turns: rendered, never as a control token, the context of a turn a prefix of the whole."""
    from kestrel.dialogue import Dialogue, Turn
    from kestrel.prompt.prompt import Prompt, Unrenderable

    tokenizer = _tokenizer()
    texts = [text for text in (part.strip() for part in data.decode("utf-8", "ignore").split("\n")) if text]
    if len(texts) < 2:
        return
    turns = [Turn("partner" if at % 2 else "self", text) for at, text in enumerate(reversed(texts[1:]))][::-1]
    dialogue = Dialogue("d", (texts[0],), tuple(turns))
    room = Prompt(tokenizer, "plain", 256)
    (rendered,) = room.render_all([dialogue])
    if isinstance(rendered, Unrenderable):
        return
    ends = [end - 1 for _, end in rendered.reply_spans]
    special = set(tokenizer.all_special_ids) | set(range(12))
    assert [at for at, token in enumerate(rendered.input_ids) if token in special] == ends
    for (start, _), (turn, _) in zip(reversed(rendered.reply_spans), reversed(list(dialogue.replies())), strict=False):
        if rendered.first_turn == 0:
            assert room.context(dialogue, turn) == rendered.input_ids[:start]


@cache
def _tokenizer() -> Any:
    import sys

    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from make_models import make_tokenizer

    return make_tokenizer()


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{name: partial(corpus, format=name) for name in FORMATS},
    "auto": partial(corpus, format="auto"),
    "config": config,
    "options": options,
    "artifacts": artifacts,
    "adapter": adapter_config,
    "generations": generations,
    "evaluation": evaluation,
    "judgements": judgements,
    "partial": partial_generations,
    "prompt": prompt,
}


def prepare(target: str) -> None:
    """Imports and builds what a target needs, so that no input is charged for it."""
    if target == "prompt":
        _tokenizer()
    with contextlib.suppress(KestrelError):
        TARGETS[target](b"")


def try_input(target: str, data: bytes) -> bool:
    """Feeds one input. Returns whether it was accepted; False where it was refused as it should be.

    Raises:
        Exception: any but a KestrelError: a bug.
    """
    try:
        TARGETS[target](data)
    except KestrelError as error:
        assert str(error).strip(), "an error without a message"
        return False
    return True
