"""The dataset artifact: what its rows hold, that its numbers are true, and that whatever no longer fits is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import make_tokenizers as make
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kestrel.config.settings import Settings
from kestrel.data.dataset import (
    dialogue_of,
    lengths_of,
    load_split,
    open_dataset,
    settings_that_shape,
    write_split,
)
from kestrel.data.read_counts import reasons
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import IGNORED, Prompt
from kestrel.runtime.manifest import MANIFEST, files_below, with_own_hash, write_manifest

COMMAND = "python preprocess.py --config a.yaml"
WORDS = ["i", "have", "two", "dogs", "like", "cars", "hi", "how", "are", "you", "?", "1987", "Zoë", "👍"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return make.falcon_like()


def corpus(count: int, seed: int = 0, candidates: bool = False) -> list[Dialogue]:
    rng = random.Random(seed)

    def text(most: int = 9) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    made = []
    for index in range(count):
        replies, opens = rng.randint(1, 5), rng.random() < 0.5
        turns = [turn for _ in range(replies) for turn in (Turn("partner", text()), Turn("self", text()))][opens:]
        made.append(
            Dialogue(
                f"d{index}",
                tuple(text() for _ in range(rng.randint(0, 3))),
                tuple(turns),
                partner_persona=(text(),) if rng.random() < 0.5 else (),
                candidates=tuple((text(), text()) for _ in range(replies)) if candidates else (),
            )
        )
    return made


def prompt(max_length: int = 1024) -> Prompt:
    return Prompt(tokenizer(), "plain", max_length)


def settings(run_dir: Path, **sections: Any) -> Settings:
    tree = {"run_dir": str(run_dir), "data": {"source": "s"}, "model": {"name": "m"}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return Settings.model_validate(tree)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [1024, 40])
def test_rows_hold_the_dialogue_and_its_rendering(tmp_path: Path, max_length: int) -> None:
    dialogues = corpus(60, candidates=True)
    written = write_split(iter(dialogues), prompt(max_length), tmp_path / "train")
    rows = load_split(tmp_path, "train", COMMAND)
    assert rows.column_names == [
        *("dialogue_id", "persona", "partner_persona", "turns", "candidates", "input_ids", "labels", "reply_spans")
    ]
    assert len(rows) == len(written.lengths)
    by_id = {dialogue.dialogue_id: dialogue for dialogue in dialogues}
    for row in rows:
        dialogue = by_id[row["dialogue_id"]]
        assert dialogue_of(row) == dialogue
        rendered = prompt(max_length).render(dialogue)
        assert row["input_ids"] == rendered.input_ids and len(row["input_ids"]) <= max_length
        expected = [IGNORED] * len(row["input_ids"])
        for start, end in row["reply_spans"]:
            assert row["input_ids"][end - 1] == tokenizer().eos_token_id
            expected[start:end] = row["input_ids"][start:end]
        assert row["labels"] == expected
    assert lengths_of(rows).tolist() == [len(row["input_ids"]) for row in rows]
    assert lengths_of(rows).dtype == np.int64
    some = rows.select([3, 1, 2])
    assert lengths_of(some).tolist() == [len(row["input_ids"]) for row in some]
    assert lengths_of(rows.select([])).tolist() == []


def test_an_empty_candidate_list_in_the_first_row_loses_nothing(tmp_path: Path) -> None:
    """`Dataset.from_list` drops columns that the first row lacks; the writer is told its features."""
    dialogues = [corpus(1)[0], *corpus(3, seed=1, candidates=True)[1:]]
    write_split(dialogues, prompt(), tmp_path / "x")
    assert [dialogue_of(row) for row in load_split(tmp_path, "x", COMMAND)] == dialogues


@pytest.mark.parametrize("max_length", [1024, 40])
def test_statistics_equal_a_recount(tmp_path: Path, max_length: int) -> None:
    dialogues = [*corpus(80), Dialogue("long", ("a",), (Turn("partner", "hi"), Turn("self", "dogs " * 3000)))]
    counts = write_split(dialogues, prompt(max_length), tmp_path / "train").as_json()
    rows = list(load_split(tmp_path, "train", COMMAND))
    kept = {row["dialogue_id"] for row in rows}
    lengths = [len(row["input_ids"]) for row in rows]
    whole = {dialogue.dialogue_id: prompt(10**6).render(dialogue) for dialogue in dialogues}
    cut = {row["dialogue_id"]: len(whole[row["dialogue_id"]].reply_spans) - len(row["reply_spans"]) for row in rows}
    assert counts["dialogues"] == len(rows) == len(dialogues) - sum(counts["dropped_at_rendering"].values())
    assert "long" not in kept
    assert counts["dropped_at_rendering"] == {"longer than prompt.max_length": len(dialogues) - len(rows)}
    assert counts["replies"] == sum(len(row["reply_spans"]) for row in rows)
    assert counts["tokens"] == sum(lengths)
    assert counts["supervised_tokens"] == sum(label != IGNORED for row in rows for label in row["labels"])
    assert counts["supervised_share"] == counts["supervised_tokens"] / counts["tokens"]
    assert counts["replies_cut"] == sum(cut.values())
    assert counts["truncated_dialogues"] == sum(
        len(row["input_ids"]) < len(whole[row["dialogue_id"]].input_ids) for row in rows
    )
    assert (counts["turns_cut"] > 0) == (max_length == 40)
    assert counts["tokens_a_dialogue"] == {
        "mean": np.mean(lengths),
        **{f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95)},
        "max": max(lengths),
    }


def test_dropped_by_reason(tmp_path: Path) -> None:
    made = make.wordpiece()
    dialogues = [
        Dialogue("fine", ("a",), (Turn("partner", "hi"), Turn("self", "hi"))),
        *(Dialogue(f"empty{n}", ("a",), (Turn("partner", "hi"), Turn("self", "\u0301"))) for n in range(2)),
        Dialogue("long", ("a",), (Turn("partner", "hi"), Turn("self", "hi " * 99))),
    ]
    statistics = write_split(dialogues, Prompt(made, "plain", 64), tmp_path / "train")
    assert statistics.dropped == Counter({"reply without a token": 2, "longer than prompt.max_length": 1})
    assert reasons(statistics.dropped) == "2: reply without a token; 1: longer than prompt.max_length"
    assert statistics.as_json()["dropped_at_rendering"] == dict(statistics.dropped)


def test_nothing_to_write(tmp_path: Path) -> None:
    statistics = write_split([], prompt(), tmp_path / "train")
    assert statistics.as_json()["dialogues"] == 0
    assert len(load_split(tmp_path, "train", COMMAND)) == 0


def test_rows_are_streamed(tmp_path: Path) -> None:
    """No more than a batch is read ahead of what has been written."""
    seen = 0

    def stream() -> Any:
        nonlocal seen
        for dialogue in corpus(1300):
            seen += 1
            yield dialogue
            if seen == 1001:
                assert (tmp_path / "train" / "data-00000-of-00001.arrow").stat().st_size > 10_000

    write_split(stream(), prompt(), tmp_path / "train")
    assert seen == 1300 and len(load_split(tmp_path, "train", COMMAND)) == 1300


# -- whether it still fits ---------------------------------------------------------------------------------------------


def make_dataset(run: Path, made_with: Settings, rendered_with: Prompt) -> Path:
    folder = run / "dataset"
    for seed, split in enumerate(("train", "validation")):
        write_split(corpus(20, seed), rendered_with, folder / split)
    (folder / "statistics.json").write_text("{}")
    write_manifest(
        folder, "dataset", settings_that_shape(made_with), {"source": {"s": "0"}}, prompt=rendered_with.identity()
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_dataset(tmp_path, settings(tmp_path), prompt())
    return tmp_path


def refused(run: Path, *parts: str, by: Settings | None = None, using: Prompt | None = None) -> str:
    with pytest.raises(KestrelError) as caught:
        folder, _ = open_dataset(by or settings(run), using or prompt(), COMMAND)
        for split in ("train", "validation"):
            load_split(folder, split, f"make it with: {COMMAND}")
    for part in (*parts, COMMAND):
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


def test_a_sound_dataset(run: Path) -> None:
    folder, manifest = open_dataset(settings(run, training={"epochs": 7.0}), prompt(), COMMAND)
    assert folder == run / "dataset" and manifest["prompt"] == prompt().identity()
    assert set(manifest["files"]) == set(files_below(folder))


def test_what_a_file_browser_leaves_is_no_part_of_it(run: Path) -> None:
    dataset = run / "dataset"
    (dataset / "train" / ".DS_Store").write_text("left before the manifest")
    write_manifest(dataset, "dataset", settings_that_shape(settings(run)), {}, prompt=prompt().identity())
    assert not any("DS_Store" in name for name in files_below(dataset))
    (dataset / "train" / ".DS_Store").unlink()
    (dataset / ".directory").write_text("left after it")
    open_dataset(settings(run), prompt(), COMMAND)


def test_the_same_input_gives_the_same_bytes(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    make_dataset(other, settings(run), prompt())
    names = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    assert len(names) == 8
    for name in names:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt": {"max_length": 512}}, "prompt.max_length: it was 1024, now 512"),
        ({"prompt": {"format": "chat"}}, "prompt.format: it was 'plain', now 'chat'"),
        ({"data": {"source": "t"}}, "data.source: it was 's', now 't'"),
        ({"data": {"both_sides": False}}, "data.both_sides: it was True, now False"),
        ({"data": {"max_dialogues": 7}}, "data.max_dialogues: it was None, now 7"),
        ({"seed": 1}, "seed: it was 0, now 1"),
    ],
)
def test_other_settings(run: Path, changed: dict, named: str) -> None:
    assert refused(run, named, "other settings", by=settings(run, **changed)).count("it was") == 1


def test_other_tokenizer(run: Path) -> None:
    other = Prompt(make.falcon_like([*make.TEXTS, "kestrels hover " * 9]), "plain", 1024)
    assert len(refused(run, "prompt.tokenizer_sha256: it was", using=other)) < 1000
    other = Prompt(make.byte_level(), "plain", 1024)
    refused(run, "prompt.end_token: it was '<|endoftext|>', now '<|im_end|>'", using=other)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(with_own_hash(manifest)))

    return edit


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train/data-00000-of-00001.arrow", flip, "is damaged or was edited"),
        ("train/data-00000-of-00001.arrow", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        ("train/data-00000-of-00001.arrow", Path.unlink, "is missing"),
        ("train/state.json", flip, "is damaged"),
        ("statistics.json", flip, "is damaged"),
        ("validation", shutil.rmtree, "is missing"),
        ("train", shutil.rmtree, "is missing"),
        ("", shutil.rmtree, "there is no dataset in"),
        (MANIFEST, Path.unlink, "there is no dataset in"),
        (MANIFEST, lambda path: path.write_text(path.read_text()[:-20]), "is damaged"),
        (MANIFEST, edit_manifest(lambda m: m["settings"]["prompt"].update(max_length=9)), "prompt.max_length: it was 9"),
        (MANIFEST, edit_manifest(lambda m: m.pop("prompt")), "prompt: it was None"),
        (MANIFEST, edit_manifest(lambda m: m["prompt"].update(end_id=3)), "prompt.end_id: it was 3, now 11"),
        (MANIFEST, edit_manifest(lambda m: m["files"].update({"x": "0"})), "is missing"),
        (MANIFEST, edit_manifest(lambda m: m.update(kind="adapter")), "does not describe a dataset"),
    ],
)  # fmt: skip
def test_damage(run: Path, name: str, damage: Callable[[Path], object], message: str) -> None:
    damage(run / "dataset" / name)
    refused(run, message, str(run / "dataset"))


def test_a_split_that_is_not_there_or_cannot_be_read(run: Path) -> None:
    with pytest.raises(KestrelError, match="has no split test; make it"):
        load_split(run / "dataset", "test", "make it")
    (run / "dataset" / "train" / "state.json").write_text("{")
    with pytest.raises(KestrelError, match="train cannot be read .*; make it"):
        load_split(run / "dataset", "train", "make it")
    flip(run / "dataset" / "validation" / "data-00000-of-00001.arrow")
    (run / "dataset" / "validation" / "data-00000-of-00001.arrow").write_bytes(b"ARROW?")
    with pytest.raises(KestrelError, match="validation cannot be read .*; make it"):
        load_split(run / "dataset", "validation", "make it")
