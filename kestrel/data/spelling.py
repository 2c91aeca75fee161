"""Characters that a tokenizer turns into its unknown token."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

from kestrel.dialogue import Dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Spelling:
    """What one tokenizer can spell."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        others = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        unknown = tokenizer.unk_token_id
        # Tokenizers of bytes need no unknown token, and name the end of text there.
        self.unknown_id = None if unknown in others else unknown
        self._tokenizer = tokenizer
        self._unknown: dict[str, bool] = {}

    def unknown_characters(self, dialogue: Dialogue) -> Counter[str]:
        """The characters of persona and turns that alone become unknown tokens."""
        texts = (*dialogue.persona, *(turn.text for turn in dialogue.turns))
        found = Counter("".join("".join(texts).split()))
        for character in found:
            if character not in self._unknown:
                ids = self._tokenizer(character, add_special_tokens=False)["input_ids"]
                self._unknown[character] = self.unknown_id in ids
        return Counter({character: count for character, count in found.items() if self._unknown[character]})


def described(unknown: Counter[str], letters: int) -> str:
    """The unknown characters in words; a script is named where its letters are a tenth of all.

    Args:
        letters: how many characters the texts have in all.
    """
    scripts: Counter[str] = Counter()
    for character, count in unknown.items():
        if character.isalpha():
            scripts[unicodedata.name(character, "?").split()[0]] += count
    shown = " ".join(character for character, _ in unknown.most_common(10))
    text = f"{unknown.total():,} characters ({len(unknown):,} different: {shown})"
    named = [
        script if script == "CJK" else script.title()
        for script, count in scripts.most_common()
        if count * 10 >= letters
    ]
    if named:
        text += f"; it cannot spell {' and '.join(named)}, so take a model that can"
    return text
