"""What texts are cut into, by the script that they are written in: tokens for BLEU, words for ROUGE-L and F1.

English keeps the words of the reference implementations (rouge_score, ParlAI). They know no letters but a to z, so that
a perfect answer in Hindi shares no word with itself. All other languages are cut at the word boundaries of Unicode
(UAX #29), which lie around every character in scripts without spaces.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import regex  # type: ignore[import-untyped]

from kestrel.errors import KestrelError

# ParlAI, parlai/core/metrics.py: each of the 32 ASCII punctuation marks becomes a space, then each article.
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BOUNDARY = regex.compile(r"\b", regex.V1 | regex.WORD)
_IN_WORDS = regex.compile(r"[^\p{Punctuation}\p{Separator}\p{Other}\s]", regex.V1)

_PAIRED = regex.compile(r"([\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{TaiTham}]+)")  # alphabets without spaces
_CLUSTER = regex.compile(r"\X")
# Scripts without spaces, besides those of Chinese and Japanese.
_SPACELESS = frozenset(["THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI", "JAVANESE", "BALINESE"])
_ASCII_MARKS = {"LATIN", "CYRILLIC", "GREEK", "HEBREW", "GEORGIAN"}  # scripts whose commas and full stops 13a knows
_SHARE = 0.1  # of the letters, from which on a script without spaces decides
_FOREIGN_SHARE = 0.005  # of the letters that are not a to z, up to which a text counts as English
_MECAB = {"ja-mecab": ("MeCab", "sacrebleu[ja]"), "ko-mecab": ("mecab_ko", "sacrebleu[ko]")}


@dataclass(frozen=True)
class Units:
    """How one corpus is cut.

    Attributes:
        tokenizer: of BLEU, by sacreBLEU's name.
        english: ROUGE-L and F1 take the words of their reference implementations, not those of Unicode.
    """

    tokenizer: str = "13a"
    english: bool = True

    def tokens(self, text: str) -> list[str]:
        """What BLEU counts, lower-cased."""
        return str(_tokenizer(self.tokenizer)(text.lower().rstrip())).split()

    def words(self, text: str) -> list[str]:
        """What F1 compares: ParlAI's normalized words in English, else those of Unicode in lower case."""
        return normalize_answer(text).split() if self.english else unicode_words(text)

    def rouge_words(self, text: str, stemmer: bool) -> list[str]:
        """What ROUGE-L compares: rouge_score's words in English, else those of Unicode in lower case."""
        return english_rouge_words(text, stemmer) if self.english else unicode_words(text)

    def count(self, text: str) -> int:
        """Words for the perplexity of each: between spaces in English, else those of Unicode."""
        return len(text.split() if self.english else unicode_words(text))

    @property
    def words_name(self) -> str:
        """Of the words that are not those of English, for signatures."""
        return f"words:uax29|regex:{regex.__version__}"


ENGLISH = Units()


def choose_units(references: Iterable[str], tokenize: str) -> Units:
    """The units that fit a corpus, by the letters of its references.

    Args:
        tokenize: `evaluation.tokenize`. auto: 13a for Latin, Cyrillic, Greek, Hebrew and Georgian script, which have its
            punctuation, or which published scores take it for; zh; ja-mecab and ko-mecab where MeCab is installed, else
            char; char for other scripts without spaces, and for emoji alone; intl for all others, whose punctuation 13a does not know. With
            13a by name, all words are those of English.

    Raises:
        KestrelError: sacreBLEU's tokenizer needs a package that is not installed, or a file that cannot be had.
    """
    if tokenize == "13a":
        return ENGLISH
    characters: Counter[str] = Counter()
    for text in references:
        characters.update(text)
    letters = {character: count for character, count in characters.items() if character.isalpha()}
    total = sum(letters.values()) or 1
    foreign = sum(count for character, count in letters.items() if not character.isascii())
    wordless = not any(character.isalnum() for character in characters)  # emoji and marks alone
    if tokenize == "auto":
        tokenizer = "char" if wordless else _fitting_tokenizer(letters, total)
    else:
        tokenizer = tokenize
        _tokenizer(tokenizer)
    return Units(tokenizer, english=not wordless and foreign / total <= _FOREIGN_SHARE)


def _fitting_tokenizer(letters: dict[str, int], total: int) -> str:
    scripts: Counter[str] = Counter()
    for character, count in letters.items():
        scripts[re.split(r"[ -]", unicodedata.name(character, "UNKNOWN"))[0]] += count
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    found = {
        "ja-mecab": kana >= _SHARE * total,
        "zh": scripts["CJK"] >= _SHARE * total and kana < _SHARE * total,
        "ko-mecab": scripts["HANGUL"] >= _SHARE * total,
        "char": sum(scripts[script] for script in _SPACELESS) >= _SHARE * total,
    }
    fitting = [name for name, fits in found.items() if fits]
    if len(fitting) > 1:
        return "char"
    if fitting:
        module = _MECAB.get(fitting[0], ("re",))[0]
        return fitting[0] if importlib.util.find_spec(module) else "char"
    most = max(scripts, key=lambda script: scripts[script], default="LATIN")
    return "13a" if most in _ASCII_MARKS else "intl"


@lru_cache
def _tokenizer(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    try:
        return BLEU(tokenize=name, force=True).tokenizer
    except (Exception, SystemExit) as error:
        if name in _MECAB:
            remedy = f"install its packages with pip install '{_MECAB[name][1]}', or choose char"
        else:
            remedy = "it downloads a model once; choose another where there is no network"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise KestrelError(f"evaluation.tokenize: {name} cannot be used here ({reason:.120}); {remedy}") from error


@lru_cache(maxsize=1 << 15)
def normalize_answer(text: str) -> str:
    """ParlAI's normalization: lower case, punctuation and articles to spaces, single spaces."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


@lru_cache(maxsize=1 << 15)
def unicode_words(text: str) -> list[str]:
    """What stands between the word boundaries of UAX #29, less spaces and punctuation, in lower case.

    Alphabets without spaces have a boundary at every letter, and two texts share most letters by chance: of these, each
    pair of neighbours is a word. A text of punctuation alone consists of its marks.
    """
    words: list[str] = []
    for piece in _PAIRED.split(text.lower()):
        letters = _CLUSTER.findall(piece) if _PAIRED.match(piece) else []
        words += [one + two for one, two in pairwise(letters)] if len(letters) > 1 else _between_boundaries(piece)
    return words or list("".join(text.split()))


def _between_boundaries(text: str) -> list[str]:
    return [piece.strip() for piece in boundaries(text) if _IN_WORDS.search(piece)]


def boundaries(text: str) -> list[str]:
    """The text cut at every word boundary of UAX #29; nothing is left out."""
    return list(_BOUNDARY.split(text))


@lru_cache(maxsize=1 << 15)
def english_rouge_words(text: str, stemmer: bool) -> list[str]:
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, _stemmer() if stemmer else None))


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    """Porter's, as rouge_score uses it, called once per word: systems share most of their words."""
    from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

    porter = PorterStemmer()
    porter.stem = lru_cache(maxsize=None)(porter.stem)
    return porter
