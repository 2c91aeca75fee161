"""Stop strings: where an answer ends besides the end token."""

from __future__ import annotations

from collections.abc import Sequence

from kestrel.prompt.prompt import Prompt

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of a character whose bytes are not complete


class StopStrings:
    """The stop strings of a run, over the tokens of its prompt.

    Attributes:
        tail: tokens that the bytes of the longest stop string can spread over; 0 without stop strings.
    """

    def __init__(self, prompt: Prompt, strings: Sequence[str]):
        self._prompt, self._strings = prompt, strings
        self.tail = max((len(stop.encode()) for stop in strings), default=0)
        self._may_end: dict[int, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._strings)

    def text_of(self, ids: Sequence[int]) -> str:
        tokenizer = self._prompt.tokenizer
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def place_in(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((text.find(stop) for stop in self._strings if stop in text), default=None)

    def are_in(self, ids: Sequence[int]) -> bool:
        """Whether tokens spell a stop string.

        Decoding thousands of rows after each token takes longer than a GPU takes for the token. A stop string can end
        only in a token that, decoded alone, has its last character, or part of a character, or no text; most rows have
        no such token.
        """
        for token in set(ids).difference(self._may_end):
            text = self.text_of([token])
            self._may_end[token] = (
                not text
                or _REPLACEMENT in text
                # Some decoders strip blanks from a single token.
                or any(stop[-1] in text or stop[-1] == " " for stop in self._strings)
            )
        return any(self._may_end[token] for token in ids) and self.place_in(self.text_of(ids)) is not None

    def cut(self, ids: Sequence[int]) -> tuple[str, int] | None:
        """Text before the first stop string, and how many tokens it takes to spell that string; None without one."""
        if self.place_in(self.text_of(ids)) is not None:
            for count in range(1, len(ids) + 1):
                text = self.text_of(ids[:count])
                if (place := self.place_in(text)) is not None:
                    return text[:place].strip(), count
        return None

    def text_so_far(self, ids: Sequence[int], is_whole: bool = False) -> tuple[str, bool]:
        """The part of a growing answer's text that no later token can change, and whether a stop string has ended it.

        Held back until the answer is whole: blanks at the end, which are stripped if they stay last, incomplete
        characters, and what may be the beginning of a stop string.
        """
        text = self.text_of(ids)
        if (place := self.place_in(text)) is not None:
            return text[:place].strip(), True
        if not is_whole:
            text = text.rstrip(_REPLACEMENT)
            begun = (n for stop in self._strings for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        return text.strip(), False
