"""Tokens of many texts, word by word from memory, where that is what the tokenizer would do itself.

Byte-level BPE first cuts a text into pieces, and no piece goes on over a blank: " how" in "hi , how" becomes the same
tokens wherever it stands. So a word is tokenized once and then looked up, which takes a twentieth of the time. What is
remembered came from the tokenizer itself; only the cutting is ours, and only where it is proven to be exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[[list[str]], list[list[int]]]

_MOST_WORDS = 2**17  # some 40 MB; beyond it, memory begins anew
_MOST_LEADS = 2**12
_LONGEST = 64  # characters; what is longer hardly comes again


def cuts_at_blanks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text may be cut before every single blank without a change in its tokens.

    That holds for the pattern of GPT-2's byte-level pre-tokenizer (a piece is an optional blank and letters, digits or
    marks), which Falcon's shares: the steps before it part punctuation from the rest, those after it only cut pieces
    further. Nothing else may look at a whole text: no normalizer, and no added token that is matched in it.
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


class Words:
    """Remembers the tokens of words.

    Args:
        tokenize: tokens of texts, special tokens read as text.
    """

    def __init__(self, tokenize: Tokenize):
        self._tokenize = tokenize
        self._leads: dict[str, list[int]] = {}  # what stands before the first blank of a text
        self._words: dict[str, list[int]] = {}  # tokens of a blank and the word

    def tokens(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Tokens of each text; what cannot be cut is tokenized whole."""
        found: dict[str, list[int]] = {}
        unknown = self._look_up(texts, found)
        self._learn(unknown)
        whole = self._look_up(unknown, found)
        found |= zip(whole, self._tokenize(whole), strict=True) if whole else ()
        return found

    def _look_up(self, texts: Iterable[str], found: dict[str, list[int]]) -> list[str]:
        """Adds the tokens of texts to `found`; returns the texts that hold something unknown."""
        word, unknown = self._words.__getitem__, []
        for text in texts:
            lead, *words = text.split(" ")
            try:
                found[text] = [*self._leads[lead], *chain.from_iterable(map(word, words))]
            except KeyError:
                unknown.append(text)
        return unknown

    def _learn(self, texts: list[str]) -> None:
        if len(self._words) > _MOST_WORDS:
            self._words.clear()
        if len(self._leads) > _MOST_LEADS:
            self._leads.clear()
        leads: set[str] = set()
        words: set[str] = set()
        for text in texts:
            lead, *rest = text.split(" ")
            leads.add(lead)
            words.update(rest)
        # A piece may end where blanks end, so that a cut next to other blanks would not be exact.
        leads = {lead for lead in leads - self._leads.keys() if len(lead) <= _LONGEST and not lead[-1:].isspace()}
        words = {word for word in words - self._words.keys() if len(word) <= _LONGEST and word.split() == [word]}
        if leads:
            self._leads |= zip(leads, self._tokenize(list(leads)), strict=True)
        if words:
            self._words |= zip(words, self._tokenize([" " + word for word in words]), strict=True)
