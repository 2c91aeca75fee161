"""Tokens of a part of a text, as the tokenizer makes them where the whole text is given to it.

Some tokenizers put a blank before a text (SentencePiece's dummy prefix: Llama 2, Mistral 7B). A part that is tokenized on
its own would get that blank in the middle of a text, and the model would learn, and answer with, other ids than the
tokenizer gives. Such tokenizers get the part behind an anchor, whose ids are then cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kind of a segment: a frame may contain control tokens, a text never does, a reply is a text that is supervised, an end
# closes a reply with a control token and is supervised with it.
Kind = Literal["frame", "text", "reply", "end"]

_ANCHORS = ("\n", "a", ".", "1", "z!")  # the first one is taken that the beginning of a part does not merge with
_BLANKS = ("▁", "Ġ")  # SentencePiece's, byte-level BPE's


class Segment(NamedTuple):
    text: str
    kind: Kind


class Piece(NamedTuple):
    """A segment with what decides its tokens: whether a blank is added before it, and the control token before it."""

    segment: Segment
    begins: bool
    control: str


class PartTokenizer:
    """Tokenizes parts of texts.

    Args:
        tokenizer: slow or fast; what it makes of a whole text is not changed.
        controls: its control tokens, by id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Mapping[int, str]):
        self._tokenizer, self._controls = tokenizer, controls
        self._frame_ids: dict[tuple[str, bool, str], list[int]] = {}  # of which few exist
        word = self._tokenized(["dog"], True)[0]
        self._adds_blank = str(tokenizer.convert_ids_to_tokens(word[:1])[0]).startswith(_BLANKS) if word else False
        self._adds_blank_after_control = (
            self._adds_blank and self._tokenized([f"{tokenizer.eos_token}dog"], False)[0][1:] == word
        )

    def pieces(self, segments: Sequence[Segment]) -> list[Piece]:
        """The segments, without empty frames, each with what decides its tokens beside its text."""
        pieces: list[Piece] = []
        begins, control = self._adds_blank, ""
        for segment in segments:
            piece = Piece(segment, begins, control)
            if segment.kind in ("text", "reply"):
                begins, control = False, ""
            elif tokens := self.frame(piece):
                control = self._controls.get(tokens[-1], "")
                begins = bool(control) and self._adds_blank_after_control
            else:
                continue
            pieces.append(piece)
        return pieces

    def texts(self, texts: Sequence[str], begins: bool) -> list[list[int]]:
        """Token ids of texts, with control tokens spelled in them read as text.

        Args:
            begins: whether a blank is added before each.
        """
        return self._tokenized(texts, True) if begins else self._inside(texts, split_specials=True)

    def frame(self, piece: Piece) -> list[int]:
        """Token ids of a frame or an end, which may contain control tokens."""
        key = (piece.segment.text, piece.begins, piece.control)
        if key not in self._frame_ids:
            text, begins, control = key
            if control:  # it may swallow blanks
                before, ids = self._tokenized([control, control + text], False)
                ids = ids[len(before) :]
            elif begins:
                (ids,) = self._tokenized([text], False)
            else:
                (ids,) = self._inside([text], split_specials=False)
            self._frame_ids[key] = ids
        return self._frame_ids[key]

    def _inside(self, texts: Sequence[str], split_specials: bool) -> list[list[int]]:
        if not self._adds_blank:
            return self._tokenized(texts, split_specials)
        found: dict[str, list[int]] = {}
        for anchor in _ANCHORS:
            left = [text for text in texts if text not in found]
            before = self._tokenized([anchor], split_specials)[0]
            for text, ids in zip(left, self._tokenized([anchor + text for text in left], split_specials), strict=True):
                if ids[: len(before)] == before:
                    found[text] = ids[len(before) :]
        # What merges with every anchor is tokenized on its own.
        left = [text for text in texts if text not in found]
        found.update(zip(left, self._tokenized(left, split_specials), strict=True))
        return [found[text] for text in texts]

    def _tokenized(self, texts: Sequence[str], split_specials: bool) -> list[list[int]]:
        """One call for all, so that all cores are used."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_specials,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return ids
