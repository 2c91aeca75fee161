"""Readers of every format: what they say of bad files, what the Hub's cache gives them, and any input at all."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_corpora import CYNAPTICS, EXPORTS, LAYOUTS, OWN, PERSONA, parlai, read, steps, write

from kestrel import hub
from kestrel.config.settings import Data
from kestrel.data import lines, locate
from kestrel.data import rows as json_rows
from kestrel.data.corpus import open_corpus
from kestrel.data.formats.recognize import FORMATS
from kestrel.data.repair import normalized
from kestrel.errors import KestrelError

ROOT = Path(__file__).resolve().parents[2]

OWN_LINE = json.dumps(OWN)
BAD = [
    ("", "is empty"),
    ("\ufeff \n", "is empty"),
    ("<!DOCTYPE html><html></html>", "web page"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    (b"\x1f\x8b\x08\x00", "cannot be read"),
    (gzip.compress(OWN_LINE.encode())[:-12], "cannot be read"),
    (b"PK\x03\x04 and no archive", "cannot be read"),
    (OWN_LINE.encode("utf-16")[:-1], "cannot be read"),
    (OWN_LINE.encode() + b'\n{"persona": ["caf\xe9"]}', r"data.x:2: byte \d+ of the file \(0xe9\)"),
    (parlai("self").encode() + b"1 your persona: caf\xe9\n", r"data.x:6: byte 20 of the line \(0xe9\)"),
    (
        '{"train": [{"personality": ["a"], "utterances": []},\n {"personality": ["\xe9"]}]}'.encode("latin-1"),
        "x:2: byte",
    ),
    (OWN_LINE + "\n" + OWN_LINE[:-9], r"data.x:2: not JSON"),
    (OWN_LINE + "\n[1]", r"data.x:2: expected an object of JSON, found \[1\]"),
    (LAYOUTS["huggingface"][:-30], "data.x:1"),
    ('{"train": [' + "[" * 10 + "]}", "data.x:1: not JSON"),
    ('{"persona": ' + "[" * 100_000, "nested too deeply"),
    ('{"train": [{"persona": ' + "[" * 100_000, "nested too deeply"),
    ('{"train": []}', "no rows"),
    (LAYOUTS["parlai"] + "no number\n", r"data.x:6: a ParlAI line is a number"),
    (LAYOUTS["parlai"] + "7 a\tb\n", r"data.x:6: line 7 of a dialogue where line 6"),
    (LAYOUTS["parlai"] + "6 no reply\n", r"data.x:6: expected 'text<TAB>reply"),
    ("1 your persona: a\r2 b\tc\r", "carriage return"),
    ("01/12/24, 10:00 - Ana: a\r01/12/24, 10:01 - Ben: b\r", "carriage return"),
    ("a,b\n1,2\n", "the format is unknown"),
    ("Persona,chat\na\n", r"data.x:2: 1 cells, but the header has 2 columns. If this is no table,"),
    ("AuthorID,Author,Date,Content\n1,a,b,c\n", "a Discord channel as a table; export it as JSON"),
    ('[{"type": "message", "user": "U1", "text": "hi", "ts": "1.1"}]', "an export of Slack"),
    ('{"name": "x", "is_user": true, "mes": "hi"}', "a chat of SillyTavern"),
    ('Persona,chat\na,"b\n', "quotation mark left open"),
    ("Persona,chat\n", "no rows"),
    (json.dumps(OWN | {"Persona": "a", "chat": "b"}), "could be kaggle or kestrel"),
    (json.dumps({"persona": "text", "turns": []}), r"data.x:1: 'persona' must be a list of texts"),
    (json.dumps({"persona": ["a"], "turns": [{"speaker": "me", "text": "a"}]}), r"turns\[0\]: 'speaker' must be"),
    (json.dumps({"persona": ["a"], "turns": [{"speaker": "self"}]}), r"turns\[0\]: 'text' must be a text"),
    (json.dumps(OWN | {"candidates": [["a"]]}), "one list for each of 3 replies"),
    (json.dumps(OWN | {"dialogue_id": "d"}) + "\n" + json.dumps(OWN | {"dialogue_id": "d"}), "x:2: .*'d' .*data.x:1 "),
    (json.dumps(OWN | {"dialogue_id": "a\ud800"}), "'dialogue_id' must be a printable text or a whole number"),
    (json.dumps(OWN | {"persona": []}), "yields no dialogue .*1: no persona"),
    (json.dumps(OWN | {"turns": OWN["turns"][:1]}), "yields no dialogue .*1: no reply"),
    (json.dumps({"train": [{"personality": ["a"], "utterances": [{"candidates": [], "history": []}]}]}), "gold reply"),
    (json.dumps(CYNAPTICS | {"dialogue": ["untagged"]}), "Persona A"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(KestrelError, match=message):
        read(write(tmp_path, content))


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_that_converts_a_file_can_be_given(tmp_path: Path, packed: bool) -> None:
    content = OWN_LINE.encode() + b'\n{"persona": ["caf\xe9"]}'
    source = write(tmp_path, gzip.compress(content) if packed else content, "my chats.jsonl" + ".gz" * packed)
    given = "unpack and convert it: iconv .* UNPACKED >" if packed else f"; convert it: iconv .* '{source}' >"
    with pytest.raises(KestrelError, match=f"{given} converted.jsonl$"):
        read(source)


PIECES = st.lists(
    st.sampled_from(["\n", "\r\n", "\r", "\x85", "\u2028", "\ufeff", "é", "字", "abc", "👍"]), max_size=20
)


def test_lines_end_at_line_feeds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path, "\ufeffab\x85\r\n\u2028c\ufeff\n\nlonger\nd\n"))
    assert list(lines.text_lines(path)) == list(
        enumerate(["ab\x85\r\n", "\u2028c\ufeff\n", "\n", "longer\n", "d\n"], 1)
    )
    monkeypatch.setattr(lines, "LONGEST_LINE", 8)
    with pytest.raises(KestrelError, match="data.x:1: a line of more than 8 bytes"):
        list(lines.text_lines(path))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(PIECES.map("".join), min_size=1, max_size=4),
    layout=st.integers(0, 3),
    chunk=st.integers(1, 9),
    escaped=st.booleans(),
)
def test_json_does_not_depend_on_how_it_is_laid_out_and_read(
    tmp_path: Path, texts: list[str], layout: int, chunk: int, escaped: bool
) -> None:
    records = [{"a": text, "b": [{"n": -12.5}, []]} for text in texts]
    written = [json.dumps(record, ensure_ascii=escaped, indent=layout == 1 or None) for record in records]
    array = "[" + ", ".join(written) + "\n]"
    content = array if layout == 2 else f'{{"train": {array}, "dev": []}}' if layout == 3 else " \n".join(written)
    path = Path(write(tmp_path, "\ufeff" + content))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_rows, "_CHUNK", chunk)
        found = list(json_rows.rows(path))
    assert [row.values for row in found] == records
    if layout == 0:
        assert [row.where for row in found] == [f"{path}:{number}" for number in range(1, len(records) + 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a":\n}\n{"a": 3}', r"data.x:2: not JSON .* at character 7 of the value, line 3"),
        ('[{"a": 1}, 2]', r"data.x:1: expected an object of JSON, found 2"),
        ('[{"a": 1}\n{"a": 2}]', r"data.x:2: expected one of , \], found '{'"),
        ('[{"a": 1}]\n[]', "data.x:2: more text after"),
        ('{"train": [{"a": 1}], "other": []}', "the key 'other' is not one of"),
        ('{"train": [{"a": 1}], 5: []}', "expected a text of JSON, found 5"),
        ('{"train": [{"a": 1}], "train": []}', "the key 'train' is not one of .* each once"),
        ('{"a": ' + "1" * 5000 + "}", "data.x:1: not JSON .Exceeds the limit"),
        ('{"a": 1, "b": "' + "x" * 99, "data.x:1: not JSON .Unterminated string"),
    ],
)  # fmt: skip
def test_bad_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str) -> None:
    for chunk in (1, 7, 2**20):
        monkeypatch.setattr(json_rows, "_CHUNK", chunk)
        with pytest.raises(KestrelError, match=message):
            list(json_rows.rows(Path(write(tmp_path, content))))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20) | st.text(st.characters(max_codepoint=127), max_size=20))
def test_plain_ascii_is_normalized_as_the_rest_is(text: str) -> None:
    assert normalized(text) == re.sub(r"[\W_]+", " ", text.casefold()).strip()
    assert normalized(text + "é").removesuffix("é").strip() == normalized(text)


def test_a_named_format_must_fit(tmp_path: Path) -> None:
    for held in LAYOUTS:
        source = write(tmp_path, LAYOUTS[held])
        for named in FORMATS:
            if named == held:
                assert open_corpus(Data(source=source, format=named)).format == held
            else:
                with pytest.raises(KestrelError, match=f"not in the format {named}.* looks like {held}"):
                    open_corpus(Data(source=source, format=named))
    settings_name_the_same = set(get_args(Data.model_fields["format"].annotation)) - {"auto"}
    assert settings_name_the_same == set(FORMATS)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, parlai("self"), "train_self.txt")
    with pytest.raises(KestrelError, match="Did you mean .*train_self.txt"):
        open_corpus(Data(source=str(tmp_path / "train_slef.txt")))


# --- the Hub, from a cache made by hand: what a download leaves behind ---


def in_cache(home: Path, repo: str, revision: str, name: str, content: bytes) -> None:
    folder = home / "hub" / ("datasets--" + repo.replace("/", "--"))
    write(folder / "snapshots" / ("c" * 40), content, name)
    write(folder / "refs", "c" * 40, revision)


def in_fresh_process(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(key, None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_hub_sets_from_the_cache(tmp_path: Path) -> None:
    rows = [{"personality": PERSONA, "conv_id": 3, **step} for step in steps()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    content = (tmp_path / "made.parquet").read_bytes()
    for split in ("train", "validation"):
        in_cache(
            tmp_path, "bavard/personachat_truecased", "refs/convert/parquet", f"full/{split}/0000.parquet", content
        )
    for split in ("train", "valid", "test"):
        name = f"data/Synthetic-Persona-Chat_{split}.csv"
        in_cache(tmp_path, "google/Synthetic-Persona-Chat", "main", name, LAYOUTS["synthetic"].encode())
    done = in_fresh_process(
        tmp_path,
        "from kestrel.config.settings import Data\n"
        "from kestrel.data.corpus import *\n"
        "from kestrel.data.reading import Reading\n"
        "for name in ('bavard/personachat_truecased', 'google/Synthetic-Persona-Chat'):\n"
        "    corpus = open_corpus(Data(source=name))\n"
        "    counts = [len(Reading(corpus, split).ranks) for split in corpus.splits]\n"
        "    print(corpus.format, *corpus.splits, *counts, corpus.fingerprint['hub revision'][:3])\n"
        "try: open_corpus(Data(source='nobody/nothing'))\n"
        "except Exception as error: print(type(error).__name__, error)\n",
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["truecased train validation 1 1 ccc", "synthetic train validation test 2 2 2 ccc"], done.stderr
    assert lines[2].startswith("KestrelError data.source nobody/nothing (revision main), which is no file here: HF_HUB")
    assert "; or fill the cache elsewhere with `hf download --repo-type dataset nobody/nothing --rev" in lines[2]
    assert len(lines) == 3


ANSWER: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=ANSWER), "the Hub knows no such repository, or it is private"),
        (errors.GatedRepoError("403", response=ANSWER), "access is restricted; ask for it"),
        (
            errors.LocalEntryNotFoundError("no"),
            "cache does not have it.*; or fill the cache elsewhere with `hf download",
        ),
        (OSError(errno.ENOSPC, "No space left"), "the disk with the Hub's cache, .* is full; free some space"),
        (RuntimeError("I/O error: No space left on device"), "the disk with the Hub's cache, .* is full"),
        (None, "none of its files has a name that ends in .txt, "),
    ],
)
def test_why_a_hub_set_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, message: str
) -> None:
    def download(*_: Any, **__: Any) -> str:
        if error:
            raise error
        return str(tmp_path / "never made")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(locate, "use_cache_without_network", lambda: None)
    with pytest.raises(KestrelError, match=message) as caught:
        open_corpus(Data(source="nobody/nothing"))
    assert ("hf download" in str(caught.value)) == ("hf download" in message)
    if isinstance(error, (OSError, RuntimeError)) and "space" in str(error):
        monkeypatch.setattr(hub, "use_cache_without_network", lambda: None)
        with pytest.raises(KestrelError, match=message), hub.plain_loading_errors("tokenizer", "nobody/nothing"):
            raise error


def test_packed_files_of_a_hub_set_are_downloaded_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        if any(fnmatch("train.jsonl.gz", pattern) for pattern in allow_patterns):
            write(tmp_path, gzip.compress(OWN_LINE.encode()), "train.jsonl.gz")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(locate, "use_cache_without_network", lambda: None)
    assert len(read("nobody/nothing")[0]) == 1


# --- any input at all: dialogues that hold the invariants, or one clear error ---

TOKENS = st.sampled_from(
    [
        *(
            "1 ",
            "2 ",
            "\n",
            "\t",
            "|",
            "your persona: ",
            "partner's persona: ",
            "User 1: ",
            "User 2: ",
            "[user 1's name]",
            ":",
        )
    ]
    + ["__ SILENCE __", "\0", "\u2028", "\u00e9", '"', ",", "{", "}", "[", "]", "hi", "hi.", "(name)", "* ", "\r", " "]
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(TOKENS, max_size=40).map("".join))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
ANY_JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
SPOKEN = st.lists(ANY_TEXT, max_size=6)
ROWS = {
    "huggingface": {"personality": SPOKEN, "utterances": st.lists(st.fixed_dictionaries({"candidates": SPOKEN, "history": SPOKEN}), max_size=3)},
    "truecased": {"personality": SPOKEN, "candidates": SPOKEN, "history": SPOKEN, "conv_id": st.integers(0, 3)},
    "cynaptics": {"conv_id": st.integers(0, 3), "persona_b": SPOKEN, "dialogue": st.lists(ANY_TEXT.map("Persona A: {}".format) | ANY_TEXT.map("Persona B: {}".format), max_size=5), "reference": ANY_TEXT},
    "synthetic": {"user 1 personas": ANY_TEXT, "user 2 personas": ANY_TEXT, "Best Generated Conversation": ANY_TEXT},
    "kaggle": {"Persona": ANY_TEXT, "chat": ANY_TEXT},
    "kestrel": {"persona": SPOKEN, "turns": st.lists(st.fixed_dictionaries({"speaker": st.sampled_from(["self", "partner"]), "text": ANY_TEXT}), max_size=6)},
}  # fmt: skip


@st.composite
def jsonl(draw: st.DrawFn) -> bytes:
    """Rows of one format; now and then one value is anything."""
    columns = ROWS[draw(st.sampled_from(sorted(ROWS)))]
    records = draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=4))
    if draw(st.booleans()):
        draw(st.sampled_from(records))[draw(st.sampled_from(sorted(columns)))] = draw(ANY_JSON)
    if draw(st.booleans()):
        return json.dumps({"train": records}).encode()
    return "\n".join(json.dumps(record) for record in records).encode()


@st.composite
def numbered(draw: st.DrawFn) -> bytes:
    texts = draw(st.lists(ANY_TEXT.filter(lambda text: "\n" not in text), max_size=8))
    return "".join(f"{number} {text}\n" for number, text in enumerate(texts, 1)).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))].encode()
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.binary(max_size=3)) + content[draw(st.integers(at, min(at + 3, len(content)))) :]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=jsonl() | numbered() | damaged() | ANY_TEXT.map(lambda text: text.encode("utf-8", "replace")))
def test_any_input_gives_dialogues_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    try:
        read(write(folder, content), **EXPORTS)
    except KestrelError as error:
        assert str(error)
    finally:
        shutil.rmtree(folder)
