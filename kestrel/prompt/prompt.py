"""How a dialogue becomes tokens, and which of them are supervised. Decided here and nowhere else.

A dialogue is rendered as segments, and each segment is tokenized on its own, as a part of the whole (parts.py). So the prompt of any turn is a token
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
from typing import TYPE_CHECKING, Any, Literal

from kestrel.config.settings import LABELS, SYSTEM
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.prompt.chat_template import ChatTemplate
from kestrel.prompt.original_format import prompt_text
from kestrel.prompt.parts import PartTokenizer, Piece, Segment
from kestrel.prompt.tokenizer import control_ids, tokenizer_fingerprint
from kestrel.runtime.manifest import sha256_of_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss skips, as everywhere in PyTorch
VERSION = 1

Format = Literal["plain", "chat", "original"]

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
        chat_template: used instead of the tokenizer's, which it replaces.
        system: what stands before the persona in the format chat.
        labels: what stands before the persona, the partner's turns and the replies in the format plain.

    Attributes:
        end_id: the control token that ends a reply, as learned.
        end_ids: all tokens that end an answer: that one, the tokenizer's, and what `ends_also_at` adds.
        notes: sentences about what the user may not expect of this prompt.

    Raises:
        KestrelError: no end-of-text token, or a chat template that is missing or cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: Format,
        max_length: int,
        chat_template: str | None = None,
        system: str = SYSTEM,
        labels: Sequence[str] = LABELS,
    ):
        self.tokenizer = tokenizer
        self.format = format
        self.max_length = max_length
        self.system = system
        self.labels = tuple(labels)
        if tokenizer.eos_token_id is None:
            raise KestrelError("the tokenizer has no end-of-text token, so the end of a reply cannot be learned")
        if chat_template is not None:
            tokenizer.chat_template = chat_template  # so that it is saved with the adapter
        self.control_ids = control_ids(tokenizer)
        # Kept here because the library searches for them at each access.
        self._unknown, self._unknown_id = tokenizer.unk_token, tokenizer.unk_token_id
        self._text_ids: dict[tuple[str, bool], list[int]] = {}  # tokens of the texts of one batch
        controls = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in sorted(self.control_ids)}
        self._parts = PartTokenizer(tokenizer, controls)
        self._template = ChatTemplate(tokenizer, list(controls.values())) if format == "chat" else None
        self.notes = list(self._template.notes) if self._template else []
        if format == "plain" and tokenizer.chat_template:
            self.notes.append(
                "this tokenizer has a chat template, as instruct models have, and prompt.format is plain; "
                "prompt.format: chat would use it"
            )
        # The beginning-of-text token where this tokenizer adds one; a chat template writes its own.
        bos = [] if self._template else tokenizer("a")["input_ids"][:1]
        self._beginning = [token for token in bos if token == tokenizer.bos_token_id]
        self._end = Segment(self._template.end if self._template else str(tokenizer.eos_token), "end")
        pieces = self._parts.pieces(self.segments(_CANARY))
        self._reply_begins = pieces[-2].begins
        self._end_ids = self._parts.frame(pieces[-1])
        self.end_id = self._end_ids[-1]
        self.end_ids = frozenset({self.end_id, int(tokenizer.eos_token_id)})

    def ends_also_at(self, ids: int | Sequence[int] | None) -> None:
        """Adds the model's own end tokens, such as those in generation_config.json. Ids of ordinary text are no ends."""
        self.end_ids |= self.control_ids.intersection([ids] if isinstance(ids, int) else ids or [])

    # -- segments ------------------------------------------------------------------------------------------------

    def segments(self, dialogue: Dialogue, first_turn: int = 0) -> list[Segment]:
        """The dialogue from `first_turn` on, cut where the tokenizer must not merge."""
        turns = dialogue.turns[first_turn:]
        if self._template is not None:
            return self._chat_segments(self._template, dialogue.persona, turns)
        if self.format == "original":
            return self._original_segments(dialogue.persona, turns)
        persona, partner, you = self.labels
        segments = [Segment(f"{persona}: " + " ".join(map(_one_line, dialogue.persona)), "text")]
        for turn in turns:
            if turn.speaker == "partner":
                segments.append(Segment(f"\n{partner}: {_one_line(turn.text)}", "text"))
            else:
                segments += (Segment(f"\n{you}:", "frame"), Segment(self._reply(turn.text), "reply"), self._end)
        return segments

    def _chat_segments(self, template: ChatTemplate, persona: Sequence[str], turns: tuple[Turn, ...]) -> list[Segment]:
        if turns and turns[0].speaker == "self":
            turns = (Turn("partner", _OPENING), *turns)
        frames = template.frames(tuple(turn.speaker for turn in turns))
        segments: list[Segment] = []
        for frame, turn in zip(frames, (Turn("partner", self._system_text(persona)), *turns), strict=True):
            if turn.speaker == "self":
                segments += (Segment(frame, "frame"), Segment(self._reply(turn.text), "reply"), self._end)
            else:
                # A blank belongs to the word that follows it, as tokenizers have it.
                visible = frame.rstrip(" ")
                segments += (Segment(visible, "frame"), Segment(frame[len(visible) :] + turn.text.strip(), "text"))
        return segments

    def _original_segments(self, persona: Sequence[str], turns: tuple[Turn, ...]) -> list[Segment]:
        last = max(index for index, turn in enumerate(turns) if turn.speaker == "self")
        history = [Turn(turn.speaker, _one_line(turn.text)) for turn in turns[:last]]
        before = Segment(prompt_text(map(_one_line, persona), history), "text")
        return [before, Segment(self._reply(turns[last].text), "reply"), self._end]

    def _reply(self, text: str) -> str:
        """The segment that holds a reply."""
        return f" {_one_line(text)}" if self._template is None else self._template.lead + text.strip()

    def _system_text(self, persona: Sequence[str]) -> str:
        return "\n".join([self.system, *persona]).strip()

    def messages(self, dialogue: Dialogue) -> list[dict[str, str]] | None:
        """A dialogue that a partner begins as messages of the chat template; None in the other formats."""
        if self._template is None:
            return None
        roles = {"partner": "user", "self": "assistant"}
        messages = [{"role": roles[turn.speaker], "content": turn.text.strip()} for turn in dialogue.turns]
        system = self._system_text(dialogue.persona)
        if self._template.takes_system:
            return [{"role": "system", "content": system}, *messages]
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        return messages

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
        raise Unrenderable(
            TOO_LONG,
            f"dialogue {dialogue.dialogue_id}: persona and last exchange alone are longer than prompt.max_length "
            f"{self.max_length}; raise it",
        )

    def render_all(self, dialogues: Sequence[Dialogue]) -> list[Rendered | Unrenderable]:
        """As `render`, with few calls of the tokenizer for all; returns the exception for what cannot be rendered."""
        pieces = {
            (piece.segment.text, piece.begins)
            for dialogue in dialogues
            for piece in self._parts.pieces(self.segments(dialogue))
            if piece.segment.kind in ("text", "reply")
        }
        for begins in (True, False):
            texts = [text for text, at_beginning in pieces if at_beginning is begins]
            keys = [(text, begins) for text in texts]
            self._text_ids.update(zip(keys, self._parts.texts(texts, begins), strict=True))
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
        piece = Piece(Segment(self._reply(text), "reply"), self._reply_begins, "")
        return [*self._text_tokens(piece, f"the reply {text[:80]!r}"), *self._end_ids]

    def reply_text(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without the library's clean-up, which removes spaces before punctuation."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _rendered_from(self, dialogue: Dialogue, first_turn: int) -> Rendered:
        where = f"dialogue {dialogue.dialogue_id}"
        ids = list(self._beginning)
        spans: list[tuple[int, int]] = []
        reply_start = 0
        for piece in self._parts.pieces(self.segments(dialogue, first_turn)):
            if piece.segment.kind in ("frame", "end"):
                ids += self._parts.frame(piece)
                if piece.segment.kind == "end":
                    spans.append((reply_start, len(ids)))
                continue
            reply_start = len(ids)
            ids += self._text_tokens(piece, where)
            if piece.segment.kind == "reply" and len(ids) == reply_start:
                raise Unrenderable(
                    "reply without a token", f"{where}: the tokenizer makes no token of {piece.segment.text[:80]!r}"
                )
        return Rendered(ids, spans, first_turn)

    def _text_tokens(self, piece: Piece, where: str) -> list[int]:
        text = piece.segment.text
        tokens = self._text_ids.get((text, piece.begins))
        if tokens is None:
            (tokens,) = self._parts.texts([text], piece.begins)
        spells_unknown = self._unknown is not None and self._unknown in text and self._unknown_id in tokens
        if spells_unknown or not self.control_ids.isdisjoint(tokens):
            raise Unrenderable(
                "text spells a control token", f"{where}: the tokenizer reads a control token in {text[:80]!r}"
            )
        return tokens

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
            if self.system != SYSTEM:
                identity["system"] = self.system
        elif self.format == "plain" and self.labels != LABELS:
            identity["labels"] = list(self.labels)
        return {**identity, "sha256": sha256_of_json(identity)}


def _one_line(text: str) -> str:
    """In the plain format a line break begins a turn, so a text must not contain one."""
    # The only printable white space is " ". Most texts are one line already, and this test is faster.
    if text.isprintable() and "  " not in text and text == text.strip():
        return text
    return " ".join(text.split())
