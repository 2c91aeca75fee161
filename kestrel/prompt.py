"""How a dialogue becomes tokens, and which of them are supervised. Nothing else in the project knows.

A dialogue is rendered as segments, and each segment is tokenized on its own. So the prompt of any turn is a token
prefix of the training sequence up to that turn, whatever the tokenizer merges across a boundary of text. What is
supervised is known by position: each reply's own tokens and the end token after it.

    plain       Persona: i have two dogs. i like cars.⏎
                Partner: hi ! how are you ?⏎
                You:| great , and you ?<eos>|⏎        | supervised |
                Partner: ...
    chat        the tokenizer's chat template, with the persona in the system message
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kestrel.artifacts import sha256_of_json
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss skips, as everywhere in PyTorch
VERSION = 1

# Kind of a segment: frame may hold control tokens, text never does, reply is text that is supervised, end is the
# token that closes a reply and is supervised with it.
Kind = Literal["frame", "text", "reply", "end"]

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


class Unrenderable(KestrelError):
    """A dialogue that cannot be rendered. `reason` is what it is counted under."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True)
class Segment:
    text: str
    kind: Kind


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
        tokenizer: slow or fast; it is not changed.
        format: plain or chat.
        max_length: longest sequence in tokens.

    Raises:
        KestrelError: no end-of-text token, or a chat template that is missing or cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: Literal["plain", "chat"], max_length: int):
        self.tokenizer = tokenizer
        self.format = format
        self.max_length = max_length
        self._cache: dict[Segment, list[int]] = {}
        if format == "chat" and not tokenizer.chat_template:
            raise KestrelError(
                "prompt.format is chat, but the tokenizer has no chat template; use prompt.format: plain"
            )
        if tokenizer.eos_token_id is None:
            raise KestrelError("the tokenizer has no end-of-text token, so the end of a reply cannot be taught")
        self._control_ids = _control_ids(tokenizer)
        self.end_id: int = tokenizer.eos_token_id
        if format == "chat":
            self._system = _takes_system(tokenizer)
            self.end_id = self._end_of_template()

    # -- segments ------------------------------------------------------------------------------------------------

    def segments(self, dialogue: Dialogue, first_turn: int = 0) -> list[Segment]:
        """The dialogue from `first_turn` on, cut where tokenization may not merge."""
        if self.format == "chat":
            return self._chat_segments(dialogue, first_turn)
        segments = [Segment("Persona: " + " ".join(_one_line(text) for text in dialogue.persona), "text")]
        for turn in dialogue.turns[first_turn:]:
            if turn.speaker == "partner":
                segments.append(Segment(f"\nPartner: {_one_line(turn.text)}", "text"))
            else:
                segments += [
                    Segment("\nYou:", "text"),
                    Segment(f" {_one_line(turn.text)}", "reply"),
                    Segment("", "end"),
                ]
        return segments

    def _chat_segments(self, dialogue: Dialogue, first_turn: int) -> list[Segment]:
        turns = list(dialogue.turns[first_turn:])
        contents = ["\n".join([_PERSONA_INTRODUCTION, *dialogue.persona])]
        if turns and turns[0].speaker == "self":
            turns.insert(0, Turn("partner", _OPENING))
        contents += [turn.text.strip() for turn in turns]
        frames = self._frames([turn.speaker for turn in turns])
        segments = [Segment(frames[0], "frame"), Segment(contents[0], "text")]
        for turn, content, frame in zip(turns, contents[1:], frames[1:], strict=False):
            # A frame that follows a reply begins with the end token, which the reply's own segment has brought.
            if segments[-1].kind == "end":
                frame = frame.removeprefix(self.tokenizer.convert_ids_to_tokens(self.end_id))
            segments.append(Segment(frame, "frame"))
            segments.append(Segment(content, "text" if turn.speaker == "partner" else "reply"))
            if turn.speaker == "self":
                segments.append(Segment("", "end"))
        return segments

    def _frames(self, speakers: Sequence[str]) -> list[str]:
        """What the chat template writes around the persona and each turn: one string before each, one after the last.

        The template is run with marks in place of the contents, so that no text of a user is ever read as a template
        or as a control token.
        """
        marks = [f"\ue000{index}\ue001" for index in range(len(speakers) + 1)]
        messages = [
            {"role": "user" if speaker == "partner" else "assistant", "content": mark}
            for speaker, mark in zip(speakers, marks[1:], strict=True)
        ]
        if self._system:
            messages.insert(0, {"role": "system", "content": marks[0]})
        else:
            messages[0] = {"role": "user", "content": f"{marks[0]}\n\n{marks[1]}"}
        rest = _run_template(self.tokenizer, messages, False)
        frames = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise KestrelError("the chat template leaves out or reorders messages; use prompt.format: plain")
            frames.append(before)
        frames.append(rest)
        if len(speakers) > 1 and speakers[-1] == "self":
            prompt = _run_template(self.tokenizer, messages[:-1], True)
            if prompt != "".join(f + m for f, m in zip(frames, marks, strict=False))[: -len(marks[-1])]:
                raise KestrelError(
                    "the chat template writes a reply's prompt differently once the reply is known, so what trains "
                    "would not be what generates; use prompt.format: plain"
                )
        return frames

    def _end_of_template(self) -> int:
        """The control token that the template writes after a reply."""
        after = self.tokenizer(self._frames(["partner", "self", "partner"])[3], add_special_tokens=False)["input_ids"]
        if not after or after[0] not in self._control_ids:
            raise KestrelError("the chat template closes a reply with no control token; use prompt.format: plain")
        return int(after[0])

    # -- tokens --------------------------------------------------------------------------------------------------

    def render(self, dialogue: Dialogue) -> Rendered:
        """Tokens of a whole dialogue; the oldest turns are left out where it is longer than max_length.

        Raises:
            Unrenderable: even the last exchange does not fit, or a text spells a control token.
        """
        first_turn = 0
        while True:
            segments = self.segments(dialogue, first_turn)
            rendered = self._join(dialogue, segments, first_turn)
            excess = len(rendered.input_ids) - self.max_length
            if excess <= 0 and rendered.reply_spans:
                return rendered
            # The next start is a partner's turn, so that the first reply that is left has something to answer.
            starts = [
                index
                for index, turn in enumerate(dialogue.turns[:-1])
                if index > first_turn and turn.speaker == "partner"
            ]
            if not starts:
                raise Unrenderable(
                    "longer than prompt.max_length",
                    f"dialogue {dialogue.dialogue_id}: the last exchange alone is {len(rendered.input_ids)} tokens, more "
                    f"than prompt.max_length {self.max_length}",
                )
            # A token is at least a byte, so what is dropped here is never more than what must be.
            freed = 0
            for before, start in itertools.pairwise([first_turn, *starts]):
                first_turn = start
                freed += sum(len(turn.text.encode()) + 32 for turn in dialogue.turns[before:start])
                if freed >= excess:
                    break

    def render_all(self, dialogues: Sequence[Dialogue]) -> list[Rendered | Unrenderable]:
        """As `render`, with one call of the tokenizer for all; what cannot be rendered stands as its exception."""
        segments = [self.segments(dialogue) for dialogue in dialogues]
        self._remember({segment for row in segments for segment in row if segment.kind in ("text", "reply")})
        results: list[Rendered | Unrenderable] = []
        for dialogue in dialogues:
            try:
                results.append(self.render(dialogue))
            except Unrenderable as error:
                results.append(error)
        self._cache.clear()
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
        """Tokens of a reply as they stand in a training sequence, its end token included."""
        segment = Segment(text.strip() if self.format == "chat" else f" {_one_line(text)}", "reply")
        return [*self._tokens(segment), self.end_id]

    def reply_text(self, ids: Sequence[int]) -> str:
        """Text of generated tokens. Spaces before punctuation stay: the library's clean-up would alter them."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _join(self, dialogue: Dialogue, segments: list[Segment], first_turn: int) -> Rendered:
        ids = self._beginning()
        spans: list[tuple[int, int]] = []
        for segment in segments:
            if segment.kind == "end":
                ids.append(self.end_id)
                spans.append((spans.pop()[0], len(ids)))
                continue
            tokens = self._tokens(segment)
            if segment.kind != "frame" and not self._control_ids.isdisjoint(tokens):
                raise Unrenderable(
                    "text spells a control token",
                    f"dialogue {dialogue.dialogue_id}: the tokenizer reads a control token in {segment.text[:80]!r}",
                )
            if segment.kind == "reply":
                spans.append((len(ids), len(ids)))
            ids += tokens
        return Rendered(ids, spans, first_turn)

    def _beginning(self) -> list[int]:
        """The beginning-of-text token where this tokenizer puts one; a chat template writes its own."""
        ids = self.tokenizer("")["input_ids"] if self.format == "plain" else []
        return [token for token in ids[:1] if token == self.tokenizer.bos_token_id]

    def _remember(self, segments: set[Segment]) -> None:
        ordered = sorted(segments, key=lambda segment: segment.text)
        if ordered:
            tokens = self.tokenizer(
                [segment.text for segment in ordered],
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            self._cache.update(zip(ordered, tokens, strict=True))

    def _tokens(self, segment: Segment) -> list[int]:
        if segment in self._cache:
            return self._cache[segment]
        encoded = self.tokenizer(
            segment.text, add_special_tokens=False, split_special_tokens=segment.kind != "frame", verbose=False
        )
        return list(encoded["input_ids"])

    # -- identity ------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What makes two prompts the same, for prompt.json; its `sha256` changes with any token of any rendering."""
        roomy = Prompt.__new__(Prompt)
        roomy.__dict__.update(self.__dict__, max_length=10**9, _cache={})
        canary = roomy.render(_CANARY)
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
    """In the plain format a line break begins a turn, so that a text must not hold one."""
    return " ".join(text.split())


def _run_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # noqa: BLE001  a template raises whatever its author chose
        raise KestrelError(f"the tokenizer's chat template fails: {error}") from None


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a system message; otherwise the persona goes into the first user message."""
    messages = [{"role": "system", "content": "\ue000"}, {"role": "user", "content": "\ue001"}]
    try:
        return "\ue000" in _run_template(tokenizer, messages, True)
    except KestrelError:
        return False


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that steer a model and that no text may spell: special and added tokens, but not runs of blanks or unknown."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special or token.content.strip()}
    return frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sha256_of_json(tokenizer.get_vocab())
    special = sha256_of_json([str(tokenizer.special_tokens_map), tokenizer.eos_token_id, tokenizer.bos_token_id])
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{special}\n{content}".encode()).hexdigest()
