"""Tokens of many texts, looked up word by word, for tokenizers where that gives the same tokens.

Byte-level BPE first cuts a text into pieces, and no piece continues across a space: " how" in "hi , how" becomes the
same tokens in every text. So a word is tokenized once, by the tokenizer itself, and then looked up, which takes a
twentieth of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[list[str]], list[list[int]]]

_MAX_WORDS = 2**17  # some 40 MB; the cache is then cleared
_MAX_BEGINNINGS = 2**12
_MAX_LENGTH = 64  # characters; longer words hardly occur again


def can_split_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text may be cut before every single space without a change in its tokens.

    That holds for the pattern of GPT-2's byte-level pre-tokenizer (a piece is an optional space and letters, digits or
    marks), which Falcon's shares: the steps before it separate punctuation, those after it only cut pieces further.
    Nothing else may see a whole text: no normalizer, and no added token that is matched in it.
    """
    from transformers import TokenizersBackend

    if (
        not isinstance(tokenizer, TokenizersBackend)
        or type(tokenizer)._encode_plus is not TokenizersBackend._encode_plus
    ):
        return False
    pipeline: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    first = pipeline["pre_tokenizer"] or {}
    steps = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    kinds = [step.get("type") for step in steps]
    if kinds.count("ByteLevel") != 1 or pipeline["normalizer"] is not None:
        return False
    at = kinds.index("ByteLevel")
    return (
        pipeline["model"]["type"] == "BPE"
        and not pipeline["model"].get("dropout")
        and steps[at].get("use_regex", True)
        and not steps[at]["add_prefix_space"]
        and all(step["type"] == "Punctuation" and step["behavior"] in ("Contiguous", "Isolated") for step in steps[:at])
        and {"Punctuation", "Digits", "Split"}.issuperset(kinds[at + 1 :])
        and all(token["special"] for token in pipeline["added_tokens"])
    )


class WordCache:
    """Remembers the tokens of words.

    Args:
        tokenize: tokens of texts, special tokens read as text.
    """

    def __init__(self, tokenize: Tokenize):
        self._tokenize = tokenize
        self._beginnings: dict[str, list[int]] = {}  # tokens of what comes before the first space of a text
        self._words: dict[str, list[int]] = {}  # tokens of a space and the word after it

    def tokens(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Tokens of each text; a text that cannot be cut is tokenized whole."""
        result: dict[str, list[int]] = {}
        unknown = self._look_up(texts, result)
        self._learn(unknown)
        whole = self._look_up(unknown, result)
        result |= zip(whole, self._tokenize(whole), strict=True) if whole else ()
        return result

    def _look_up(self, texts: Iterable[str], result: dict[str, list[int]]) -> list[str]:
        """Adds the tokens of texts to `result`; returns the texts with a word that is not in the cache."""
        word, unknown = self._words.__getitem__, []
        for text in texts:
            beginning, *words = text.split(" ")
            try:
                result[text] = [*self._beginnings[beginning], *chain.from_iterable(map(word, words))]
            except KeyError:
                unknown.append(text)
        return unknown

    def _learn(self, texts: list[str]) -> None:
        if len(self._words) > _MAX_WORDS:
            self._words.clear()
        if len(self._beginnings) > _MAX_BEGINNINGS:
            self._beginnings.clear()
        split = [text.split(" ") for text in texts]
        beginnings = {beginning for beginning, *_ in split} - self._beginnings.keys()
        words = {word for _, *words in split for word in words} - self._words.keys()
        # A piece may end where spaces end, so that a cut next to other white space would not be exact.
        beginnings = {text for text in beginnings if len(text) <= _MAX_LENGTH and not text[-1:].isspace()}
        words = {word for word in words if len(word) <= _MAX_LENGTH and word.split() == [word]}
        if beginnings:
            self._beginnings |= zip(beginnings, self._tokenize(list(beginnings)), strict=True)
        if words:
            self._words |= zip(words, self._tokenize([" " + word for word in words]), strict=True)
