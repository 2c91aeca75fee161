"""Tokens looked up word by word are the tokenizer's own, for any text; and where they would not be, nothing is cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import make_tokenizers as make
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kestrel.prompt import word_cache
from kestrel.prompt.word_cache import WordCache, can_split_at_spaces

ROOT = Path(__file__).resolve().parents[2]
CUT = {
    "falcon": make.falcon_like,
    "byte level": make.byte_level,
    "quickstart": lambda: PreTrainedTokenizerFast.from_pretrained(str(ROOT / "quickstart" / "base")),
}
# What one library or the other takes for white space, letters, digits or marks, next to single and double blanks.
PIECES = st.sampled_from(
    [
        *(" ", "  ", " ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x1f", "\x85", "\u00a0", "\u180e", "\u200b", "\u2028"),
        *("\u3000", "\ufeff", "a", "I", "dogs", "'s", "'", "'LL", "1", "12345"),
        *("³", "½", "é", "e\u0301", "ß", "ﷺ", "字"),
        *("!", "...", "?!", "_", "—", "👍🏽", "\u0301", "\0", "<|endoftext|>", ">>TITLE<<", "\nPartner:", "Persona:"),
    ]
)
TEXT = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=9).map("".join)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return CUT[name]()


def plainly(made: PreTrainedTokenizerFast) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: made(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@cache
def remembering(name: str) -> WordCache:
    return WordCache(plainly(tokenizer(name)))


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_looked_up_as_tokenized(name: str, texts: list[str]) -> None:
    assert can_split_at_spaces(tokenizer(name))
    for given_ in (texts, texts[::-1]):  # once learned, and once known
        assert remembering(name).tokens(given_) == dict(zip(given_, plainly(tokenizer(name))(given_), strict=True))


@pytest.mark.parametrize("name", CUT)
def test_words_that_are_known_are_not_tokenized_again(name: str) -> None:
    asked: list[str] = []

    def ask(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return plainly(tokenizer(name))(texts)

    memory = WordCache(ask)
    memory.tokens(["\nPartner: hi ! how are you ?", " i have two dogs"])
    assert sorted(asked) == sorted(
        ["", "\nPartner:", *(" hi ! how are you ? i have two dogs".replace(" ", "\0 ").split("\0")[1:])]
    )
    asked.clear()
    known = "\nPartner: how two dogs have you ?"
    assert memory.tokens([known])[known] == plainly(tokenizer(name))([known])[0]
    assert asked == []


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 50)
    monkeypatch.setattr(word_cache, "_MAX_BEGINNINGS", 20)
    memory = WordCache(plainly(tokenizer("falcon")))
    for number in range(30):
        texts = [f"{number}x{other} a{number} b{other} " + "c" * 1000 for other in range(10)]
        assert list(memory.tokens(texts).values()) == plainly(tokenizer("falcon"))(texts)
        assert len(memory._words) <= 50 + 11 and len(memory._beginnings) <= 20 + 10
    assert max(map(len, memory._words)) <= 64


def changed(change: Callable[[PreTrainedTokenizerFast], object]) -> PreTrainedTokenizerFast:
    made = make.byte_level()
    change(made)
    return made


class Own(PreTrainedTokenizerFast):
    """Somebody's own, which may look at the whole text."""

    def _encode_plus(self, *arguments: object, **more: object) -> object:
        return super()._encode_plus(*arguments, **more)


NOT_CUT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "sentencepiece": make.sentencepiece_like,
    "unigram": make.unigram,
    "wordpiece": make.wordpiece,
    "normalizer": lambda: changed(lambda made: setattr(made.backend_tokenizer, "normalizer", normalizers.Strip())),
    "prefix": lambda: changed(
        lambda made: setattr(made.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
    ),
    "no pattern": lambda: changed(
        lambda made: setattr(
            made.backend_tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        )
    ),
    "none": lambda: changed(lambda made: setattr(made.backend_tokenizer, "pre_tokenizer", None)),
    "added words": lambda: changed(lambda made: made.add_tokens(["two dogs"])),
    "own class": lambda: Own(tokenizer_object=make.byte_level().backend_tokenizer, eos_token="<|im_end|>"),
}


@pytest.mark.parametrize("name", NOT_CUT)
def test_what_may_look_further_than_a_word_is_left_alone(name: str) -> None:
    assert not can_split_at_spaces(NOT_CUT[name]())


@pytest.mark.parametrize("name", ["normalizer", "added words"])
def test_there_a_cut_would_change_tokens(name: str) -> None:
    """The property above is not empty: for these tokenizers it does not hold."""
    made, text = NOT_CUT[name](), "i have two dogs"
    assert WordCache(plainly(made)).tokens([text])[text] != plainly(made)([text])[0]
