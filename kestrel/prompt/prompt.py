"""How a dialogue becomes tokens, and which of them are supervised. Decided here and nowhere else.

A dialogue is rendered as segments, and each segment is tokenized on its own. So the prompt of any turn is a token
prefix of the training sequence up to that turn, whatever the tokenizer merges across boundaries of text. Supervised
are, by position, the tokens of each reply and the end token after it.

    plain       Persona: i have two dogs. i like cars.⏎
                Partner: hi ! how are you ?⏎
                You:| great , and you ?<eos>|⏎        | supervised |
                Partner: ...
    chat        the tokenizer's chat template, with the persona in the system message
    original    the original project's; only a dialogue's last reply is supervised (original_format.py)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.chat_template import ChatTemplate
from kestrel.prompt.original_format import introduction, prompt_text
from kestrel.prompt.tokenizer import tokenizer_fingerprint
from kestrel.runtime.manifest import sha256_of_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss skips, as everywhere in PyTorch
VERSION = 1

# Kind of a segment: a frame may contain control tokens, a text never does, a reply is a text that is supervised, an end
# closes a reply with a control token and is supervised with it.
Kind = Literal["frame", "text", "reply", "end"]
Format = Literal["plain", "chat", "original"]

_PERSONA_INTRODUCTION = "You are the following person. Answer as this person would."
_OPENING = "(You speak first.)"
_CANARY = Dialogue(
    "canary",
    ("i've 2 dogs .", "My name is Zoë."),
    (
        Turn("partner", "hi ! how are you ?"),
        Turn("self", "great , thanks :-)"),
        Turn("partner", "<|x|>"),
        Turn("self", "ok"),
    ),
)
TOO_LONG = "longer than prompt.max_length"


class Unrenderable(KestrelError):
    """A dialogue that cannot be rendered. Drops are counted by `reason`."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


class Segment(NamedTuple):
    text: str
    kind: Kind


_YOU = Segment("\nYou:", "frame")


@dataclass(frozen=True)
class Rendered:
    """A dialogue as the model sees it.

    Attributes:
        input_ids: token ids.
        reply_spans: start and end (exclusive) of each supervised reply, its end token included.
        first_turn: index of the first turn that is in the sequence; older ones did not fit.
    """

    input_ids: list[int]
    reply_spans: list[tuple[int, int]]
    first_turn: int

    @property
    def labels(self) -> list[int]:
        """input_ids where supervised, -100 elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.reply_spans:
            labels[start:end] = self.input_ids[start:end]
        return labels


class Prompt:
    """Renders dialogues for one tokenizer in one format.

    Args:
        tokenizer: slow or fast; what it makes of a text is not changed.
        format: plain, chat or original.
        max_length: longest sequence in tokens.

    Attributes:
        end_id: the control token that ends a reply; generation stops at it.

    Raises:
        KestrelError: no end-of-text token, or a chat template that is missing or cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: Format, max_length: int):
        self.tokenizer = tokenizer
        self.format = format
        self.max_length = max_length
        if tokenizer.eos_token_id is None:
            raise KestrelError("the tokenizer has no end-of-text token, so the end of a reply cannot be learned")
        self._control_ids = _control_ids(tokenizer)
        # Kept here because the library searches for them at each access.
        self._unknown, self._unknown_id = tokenizer.unk_token, tokenizer.unk_token_id
        self._text_ids: dict[str, list[int]] = {}  # tokens of the texts of one batch
        self._frame_ids: dict[str, list[int]] = {}  # tokens of frames, of which few exist
        controls = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(self._control_ids))]
        self._template = ChatTemplate(tokenizer, controls) if format == "chat" else None
        if self._template is None:
            # The beginning-of-text token where this tokenizer adds one; a chat template writes its own.
            self._beginning = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
            end_text, self._end_ids = str(tokenizer.eos_token), [int(tokenizer.eos_token_id)]
        else:
            self._beginning = []
            end_text, self._end_ids = self._template.end, self._tokens_of_frame(self._template.end)
        self.end_id = self._end_ids[-1]
        self._end = Segment(end_text, "end")

    # -- segments ------------------------------------------------------------------------------------------------

    def segments(self, dialogue: Dialogue, first_turn: int = 0) -> list[Segment]:
        """The dialogue from `first_turn` on, cut where the tokenizer must not merge."""
        turns = dialogue.turns[first_turn:]
        if self._template is not None:
            return self._chat_segments(self._template, dialogue.persona, turns)
        if self.format == "original":
            return self._original_segments(dialogue.persona, turns)
        segments = [Segment(self._persona_text(dialogue), "text")]
        for turn in turns:
            if turn.speaker == "partner":
                segments.append(Segment(self._turn_text(turn), "text"))
            else:
                segments += (_YOU, Segment(self._turn_text(turn), "reply"), self._end)
        return segments

    def _chat_segments(self, template: ChatTemplate, persona: Sequence[str], turns: tuple[Turn, ...]) -> list[Segment]:
        if turns and turns[0].speaker == "self":
            turns = (Turn("partner", _OPENING), *turns)
        frames = template.frames(tuple(turn.speaker for turn in turns))
        segments = [Segment(frames[0], "frame"), Segment(_system_text(persona), "text")]
        for turn, frame in zip(turns, frames[1:], strict=True):
            segments.append(Segment(frame, "frame"))
            segments.append(Segment(self._turn_text(turn), "text" if turn.speaker == "partner" else "reply"))
            if turn.speaker == "self":
                segments.append(self._end)
        return segments

    def _original_segments(self, persona: Sequence[str], turns: tuple[Turn, ...]) -> list[Segment]:
        last = max(index for index, turn in enumerate(turns) if turn.speaker == "self")
        history = [Turn(turn.speaker, _one_line(turn.text)) for turn in turns[:last]]
        before = Segment(prompt_text(map(_one_line, persona), history), "text")
        return [before, Segment(self._turn_text(turns[last]), "reply"), self._end]

    def _persona_text(self, dialogue: Dialogue) -> str:
        if self._template is not None:
            return _system_text(dialogue.persona)
        if self.format == "original":
            return introduction(map(_one_line, dialogue.persona))
        return "Persona: " + " ".join(_one_line(text) for text in dialogue.persona)

    def _turn_text(self, turn: Turn) -> str:
        """The segment that holds a turn's text."""
        if self._template is not None:
            return (self._template.lead if turn.speaker == "self" else "") + turn.text.strip()
        return f"\nPartner: {_one_line(turn.text)}" if turn.speaker == "partner" else f" {_one_line(turn.text)}"

    # -- tokens --------------------------------------------------------------------------------------------------

    def render(self, dialogue: Dialogue) -> Rendered:
        """Tokens of a whole dialogue; the oldest turns are left out where it is longer than max_length.

        Raises:
            Unrenderable: even the last exchange does not fit, or a text cannot be tokenized as text.
        """
        rendered = self._rendered_from(dialogue, 0)
        if len(rendered.input_ids) <= self.max_length:
            return rendered
        last_reply = max((index for index, _ in dialogue.replies()), default=0)
        # Starts are partner's turns, so that the first reply that is left has something to answer.
        starts = [index for index in range(1, last_reply) if dialogue.turns[index].speaker == "partner"]
        # Each exchange that is left out makes it shorter.
        first = bisect_left(
            starts, True, key=lambda start: len(self._rendered_from(dialogue, start).input_ids) <= self.max_length
        )
        if first < len(starts):
            return self._rendered_from(dialogue, starts[first])
        where = f"dialogue {dialogue.dialogue_id}"
        raise Unrenderable(
            TOO_LONG,
            f"{where}: persona and last exchange alone are longer than prompt.max_length {self.max_length}; raise it",
        )

    def render_all(self, dialogues: Sequence[Dialogue]) -> list[Rendered | Unrenderable]:
        """As `render`, with one call of the tokenizer for all; returns the exception for what cannot be rendered."""
        texts = {self._turn_text(turn) for dialogue in dialogues for turn in dialogue.turns}
        texts.update(map(self._persona_text, dialogues))
        if texts:
            self._text_ids.update(zip(texts, self._tokenized(list(texts)), strict=True))
        results: list[Rendered | Unrenderable] = []
        for dialogue in dialogues:
            try:
                results.append(self.render(dialogue))
            except Unrenderable as error:
                results.append(error)
        self._text_ids.clear()
        return results

    def context(self, dialogue: Dialogue, turn: int) -> list[int]:
        """Prompt of the reply in `turn`: all tokens before its first one."""
        rendered = self.render(replace(dialogue, turns=dialogue.turns[: turn + 1], candidates=()))
        return rendered.input_ids[: rendered.reply_spans[-1][0]]

    def open_context(self, dialogue: Dialogue) -> list[int]:
        """Prompt for a reply that does not exist yet, after the last turn of the dialogue."""
        placeholder = replace(dialogue, turns=(*dialogue.turns, Turn("self", "ok")), candidates=())
        return self.context(placeholder, len(dialogue.turns))

    def reply_ids(self, text: str) -> list[int]:
        """Tokens of a reply as in a training sequence, its end included.

        Raises:
            Unrenderable: the text cannot be tokenized as text.
        """
        return [*self._tokens_of_text(self._turn_text(Turn("self", text)), f"the reply {text[:80]!r}"), *self._end_ids]

    def reply_text(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without the library's clean-up, which removes spaces before punctuation."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _rendered_from(self, dialogue: Dialogue, first_turn: int) -> Rendered:
        where = f"dialogue {dialogue.dialogue_id}"
        ids = list(self._beginning)
        spans: list[tuple[int, int]] = []
        reply_start = 0
        for segment in self.segments(dialogue, first_turn):
            if segment.kind == "frame":
                ids += self._tokens_of_frame(segment.text)
            elif segment.kind == "end":
                ids += self._end_ids
                spans.append((reply_start, len(ids)))
            else:
                reply_start = len(ids)
                ids += self._tokens_of_text(segment.text, where)
                if segment.kind == "reply" and len(ids) == reply_start:
                    raise Unrenderable(
                        "reply without a token", f"{where}: the tokenizer makes no token of {segment.text[:80]!r}"
                    )
        return Rendered(ids, spans, first_turn)

    def _tokenized(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts, with control tokens spelled in them read as text; one call, so that all cores are used."""
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _tokens_of_text(self, text: str, where: str) -> list[int]:
        tokens = self._text_ids.get(text)
        if tokens is None:
            (tokens,) = self._tokenized([text])
        spells_unknown = self._unknown is not None and self._unknown in text and self._unknown_id in tokens
        if spells_unknown or not self._control_ids.isdisjoint(tokens):
            raise Unrenderable(
                "text spells a control token", f"{where}: the tokenizer reads a control token in {text[:80]!r}"
            )
        return tokens

    def _tokens_of_frame(self, text: str) -> list[int]:
        if text not in self._frame_ids:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
            self._frame_ids[text] = list(encoded["input_ids"])
        return self._frame_ids[text]

    # -- identity ------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What identifies a prompt, for prompt.json; its `sha256` changes with any token of any rendering."""
        canary = self._rendered_from(_CANARY, first_turn=0)
        identity: dict[str, Any] = {
            "format": self.format,
            "version": VERSION,
            "end_id": self.end_id,
            "end_token": self.tokenizer.convert_ids_to_tokens(self.end_id),
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
            "canary_ids": canary.input_ids,
            "canary_spans": [list(span) for span in canary.reply_spans],
        }
        if self.format == "chat":
            identity["chat_template"] = self.tokenizer.chat_template
        return {**identity, "sha256": sha256_of_json(identity)}


def _one_line(text: str) -> str:
    """In the plain format a line break begins a turn, so a text must not contain one."""
    # The only printable white space is " ". Most texts are one line already, and this test is faster.
    if text.isprintable() and "  " not in text and text == text.strip():
        return text
    return " ".join(text.split())


def _system_text(persona: Sequence[str]) -> str:
    return "\n".join([_PERSONA_INTRODUCTION, *persona]).strip()


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that control a model and that no text may spell: special tokens and added tokens that look like markup.

    Added words and runs of spaces are text. So is the unknown token, unless it is also the end or the beginning of a text.
    """
    markup = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or any(not (char.isalnum() or char.isspace()) for char in token.content)
    }
    boundaries = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return frozenset({*markup, *tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - boundaries))
