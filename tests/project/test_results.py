"""benchmarks/results.py: other recipes see the same dialogues, what is recorded is not run again, and the page is filled."""

from __future__ import annotations

import json
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest
from make_models import write_base, write_corpus
from make_tokenizers import byte_level
from scripts import rows_in, script

from benchmarks import recipes, results

TRIVIAL = {"copy_partner", "random_persona", "random_reply", "constant_reply", "constant_words"}


class Inline:
    """Does at once what a pool of threads would do, because scripts handle signals, which only the main thread may."""

    def __init__(self, workers: int) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future


def in_this_process(runner: results.Runner, program: str, words: list[str], device: str | None) -> dict[str, Any]:
    """Instead of a process for each script."""
    if program == "recipes.py":
        assert recipes.main(words) == 0
    else:
        _, name, _, *argv = words
        assert script(name).main(argv) == 0
    return {"seconds": 1.0, "peak_bytes": 2**30}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every recipe left behind, and the record."""
    folder = tmp_path_factory.mktemp("results")
    model = write_base(folder / "model", "llama", byte_level())
    dialogues = write_corpus(folder / "corpus", dialogues=40) / "train.jsonl"
    arms = ["kestrel-chat", "original", "base-plain", *(["trl-turns", "trl-dialogues"] if find_spec("trl") else [])]
    words = (
        f"--text {dialogues} --model {model} --work {folder / 'work'} --output {folder / 'record.jsonl'} --max-steps 1"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "ThreadPoolExecutor", Inline)
        patch.setattr(results.Runner, "_python", in_this_process)
        for _ in range(2):  # the second time there is nothing left to run
            assert results.main([*words.split(), "--arms", *arms, "--seeds", "1"]) == 0
    assert {line["arm"] for line in rows_in(folder / "record.jsonl")} == {*arms, "data", *TRIVIAL}
    assert len(rows_in(folder / "record.jsonl")) == 1 + len(arms) + len(TRIVIAL)
    return folder


def test_every_arm_answers_the_same_replies_and_trains_on_none_of_their_personas(work: Path) -> None:
    data, *lines = rows_in(work / "record.jsonl")
    for line in lines:
        counts = {name: len(rows) for name, rows in line["sums"].items()}
        assert set(counts.values()) == {data["dialogues"]["test"]}
        assert sum(count for _, count in line["sums"]["f1"]) == data["replies"]["test"]
    personas = {
        split: {tuple(row["persona"]) for row in rows_in(work / "work" / "dialogues" / f"{split}.jsonl")}
        for split in ("train", "test")
    }
    assert not personas["train"] & personas["test"]
    for row in rows_in(work / "work" / "dialogues" / "test.jsonl"):
        said = [turn["text"] for turn in row["turns"] if turn["speaker"] == "self"]
        assert all(
            reference not in drawn and len(set(drawn)) == len(drawn) > 2
            for reference, drawn in zip(said, row["candidates"], strict=True)
        )


def test_other_recipes_train_on_the_prompts_that_kestrel_answers(work: Path) -> None:
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(work / "model"))
    rows = list(load_from_disk(str(work / "work" / "kestrel-chat-1" / "dataset" / "train")))
    for row in rows[:5]:
        for example, (start, end) in zip(recipes.as_messages(row, tokenizer), row["reply_spans"], strict=True):
            prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, tokenize=False)
            assert prompt == tokenizer.decode(row["input_ids"][:start])
            assert example["completion"][0]["content"] + "<|im_end|>" == tokenizer.decode(row["input_ids"][start:end])
    turns = load_from_disk(str(work / "work" / "original-1" / "dataset" / "train"))
    assert len(turns) == sum(len(row["reply_spans"]) for row in rows)


def test_the_page_is_filled_from_the_record(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(results.ROOT / "docs"))
    import fill_results

    def filled_blocks() -> dict[str, str]:
        for cached in (fill_results.record, fill_results.sums):
            cached.cache_clear()
        try:
            blocks: dict[str, str] = fill_results.blocks()
            return blocks
        finally:
            fill_results.record.cache_clear()
            fill_results.sums.cache_clear()

    monkeypatch.setattr(fill_results, "RECORD", work / "record.jsonl")
    lines = rows_in(work / "record.jsonl")
    of_one_seed = filled_blocks()
    other_seed = json.loads(json.dumps(next(line for line in lines if line["arm"] == "original")))
    with open(work / "record.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(other_seed | {"seed": 2}) + "\n")
    filled = filled_blocks()
    assert filled["tests"] == of_one_seed["tests"], "the same seed twice says no more than once"
    original = next(line for line in filled["systems"].splitlines() if "original" in line)
    assert "± 0.0" in original and "1.0 |" in original, "two seeds that are the same do not spread"
    assert "Against the original project's recipe" in filled["tests"] and "(p = " in filled["tests"]
    assert "Kestrel, chat template" in filled["answers"]
