"""What a tokenizer's chat template writes around the texts of a dialogue, and whether it can be trained on.

The template is run with marks in place of the texts, so that no text of a user is ever read as a template or as a
control token. A template is refused if its prompt for a reply changes once the reply, or what follows it, is known:
the model would train on another prompt than it generates from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kestrel.errors import KestrelError
from kestrel.prompt.limits import limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates write today's date, and the prompt must be the same on the day of generation. The library turns functions
# that are passed for a template into text (transformers 5.23), so the date is fixed inside the template.
_DATE = (
    "{%- macro strftime_now(format) -%}{%- if format == '%Y-%m-%d' -%}2024-07-26{%- else -%}26 Jul 2024{%- endif -%}"
    "{%- endmacro -%}"
)
_REWRITES = (
    "the chat template writes a reply's prompt differently once the reply or what follows it is known, so the model would "
    "train on another prompt than it generates from; use prompt.format: plain"
)
_UNCLOSED = "the chat template closes a reply with no control token; use prompt.format: plain"


class ChatTemplate:
    """The strings that a chat template writes around the persona and the turns.

    Args:
        tokenizer: with the template.
        controls: its control tokens, as text.

    Attributes:
        lead: white space between a reply's prompt and its text, which the reply begins with; mostly none.
        end: what closes a reply: white space, mostly none, and a control token.

    Raises:
        KestrelError: the tokenizer has no template, or it cannot be trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: list[str]):
        if not tokenizer.chat_template:
            raise KestrelError(
                "prompt.format is chat, but the tokenizer has no chat template; use prompt.format: plain"
            )
        self._tokenizer = tokenizer
        self._source = tokenizer.get_chat_template()
        if "strftime_now" in self._source:
            self._source = _DATE + self._source
        self._takes_system = self._writes_system()
        self._rendered: dict[tuple[tuple[str, ...], bool], str] = {}
        self._frames: dict[tuple[str, ...], list[str]] = {}
        exchange = ("partner", "self")
        before = self._before_last(exchange)
        prompt = self._run(exchange[:1], prompt=True)
        self.lead = before[len(prompt) :]
        if not before.startswith(prompt) or self.lead.strip():
            raise KestrelError(_REWRITES)
        after = self._around((*exchange, "partner"))[3]
        visible = after.lstrip()
        control = max((token for token in controls if visible.startswith(token)), key=len, default="")
        if not control:
            raise KestrelError(_UNCLOSED)
        self.end = after[: len(after) - len(visible)] + control
        for exchanges in (1, 2, 3, 4):  # longer dialogues are checked when they are rendered
            self.frames(exchange * exchanges)

    def frames(self, speakers: tuple[str, ...]) -> list[str]:
        """One string before the persona and one before each turn, without `lead` and `end`.

        Args:
            speakers: of the turns, partner or self in turn, a partner first.

        Raises:
            KestrelError: the template rewrites what it wrote before.
        """
        if speakers in self._frames:
            return self._frames[speakers]
        around = self._around(speakers)
        frames = around[:1]
        for index, (speaker, frame) in enumerate(zip(speakers, around[1:], strict=False)):
            if index and speakers[index - 1] == "self":
                frame = self._without_end(frame)
            if speaker == "self":
                if not frame.endswith(self.lead):
                    raise KestrelError(_REWRITES)
                frame = frame[: len(frame) - len(self.lead)]
            frames.append(frame)
        if speakers[-1:] == ("self",):
            self._without_end(around[-1])
            earlier = speakers[:-2]
            if (
                self._before_last(speakers) != self._run(speakers[:-1], prompt=True) + self.lead
                or earlier
                and self._around(earlier)[:-1] != around[: len(earlier) + 1]
            ):
                raise KestrelError(_REWRITES)
        self._frames[speakers] = frames
        return frames

    def _without_end(self, frame: str) -> str:
        if not frame.startswith(self.end):
            raise KestrelError(_UNCLOSED)
        return frame[len(self.end) :]

    def _around(self, speakers: tuple[str, ...]) -> list[str]:
        """What is written before the persona, before each turn, and after the last."""
        rest, around = self._run(speakers, prompt=False), []
        for number in range(len(speakers) + 1):
            before, mark, rest = rest.partition(_mark(number))
            if not mark:
                raise KestrelError("the chat template leaves out or reorders messages; use prompt.format: plain")
            around.append(before)
        return [*around, rest]

    def _before_last(self, speakers: tuple[str, ...]) -> str:
        return self._run(speakers, prompt=False).partition(_mark(len(speakers)))[0]

    def _run(self, speakers: tuple[str, ...], prompt: bool) -> str:
        """The template's rendering of a dialogue with a mark for each text; `prompt`: with the beginning of a reply."""
        if (speakers, prompt) in self._rendered:
            return self._rendered[speakers, prompt]
        messages = [
            {"role": "user" if speaker == "partner" else "assistant", "content": _mark(number)}
            for number, speaker in enumerate(speakers, start=1)
        ]
        if self._takes_system:
            messages.insert(0, {"role": "system", "content": _mark(0)})
        else:
            messages[0]["content"] = f"{_mark(0)}\n\n{_mark(1)}"
        rendered = self._rendered[speakers, prompt] = self._apply(messages, prompt)
        return rendered

    def _apply(self, messages: list[dict[str, str]], prompt: bool) -> str:
        def render() -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=self._source, tokenize=False, add_generation_prompt=prompt
                )
            )

        try:
            return limited(render, "the tokenizer's chat template")
        except KestrelError as error:
            raise KestrelError(f"{error}; fix it or use prompt.format: plain") from None

    def _writes_system(self) -> bool:
        """Whether the template takes a system message; otherwise the persona goes into the first user message."""
        messages = [{"role": "system", "content": _mark(0)}, {"role": "user", "content": _mark(1)}]
        try:
            return _mark(0) in self._apply(messages, prompt=True)
        except KestrelError:
            return False


def _mark(number: int) -> str:
    """A placeholder for a text while the template runs, of private-use characters, which no template writes."""
    return f"\ue000{number}\ue001"
