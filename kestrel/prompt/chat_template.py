"""What a tokenizer's chat template writes around the texts of a dialogue, and whether it can be trained on.

The template is run with marks in place of the texts, so that no text of a user is ever read as a template or as a
control token. Each message is written as the template writes it while it is the newest one. So the prompt of a reply does
not depend on what follows, even where a template (Qwen3's) takes an empty thought back from earlier replies. Apart from
such thoughts, the result must be the template's own rendering of the whole dialogue; otherwise it is refused.
"""

from __future__ import annotations

import difflib
import json
import re
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
# What templates call the switch: Qwen3, SmolLM3 and others; DeepSeek V3.1 and Granite.
_NO_THINKING = {"enable_thinking": False, "thinking": False}
_EMPTY_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*|$)")  # closed, or open at the end of a prompt
_EXCHANGES = 4  # that are checked at once; longer dialogues are when they are rendered
_MARK = re.compile("\ue000([0-9]+)\ue001")
_WAYS_OUT = "use prompt.format: plain, or give a template of your own: prompt.chat_template: FILE"


class ChatTemplate:
    """The strings that a chat template writes around the persona and the turns.

    Args:
        tokenizer: with the template.
        controls: its control tokens, as text.

    Attributes:
        lead: white space between a reply's prompt and its text, which the reply begins with; mostly none.
        end: what closes a reply: white space, mostly none, and a control token.
        notes: sentences about what the user may not expect.
        takes_system: whether it writes a system message; else the persona begins the first user message.

    Raises:
        KestrelError: the tokenizer has no template, or it cannot be trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: list[str]):
        if not tokenizer.chat_template:
            raise KestrelError(f"prompt.format is chat, but the tokenizer has no chat template; {_WAYS_OUT}")
        self._tokenizer = tokenizer
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError:  # of several templates none is the default
            names = ", ".join(sorted(tokenizer.chat_template))
            raise KestrelError(
                f"the tokenizer has several chat templates ({names}) and no default; {_WAYS_OUT}"
            ) from None
        if "strftime_now" in self._source:
            self._source = _DATE + self._source
        self.notes: list[str] = []
        self._rendered: dict[tuple[tuple[str, ...], bool], str] = {}
        self.takes_system = self._takes_system_message()
        if not self.takes_system:
            self.notes.append(
                "the chat template writes no system message before the first user message, so the persona begins the "
                "first user message"
            )
        self._first = self._around(("partner", "self"))[:2]
        between = self._around(("partner", "self", "partner"))[3]
        visible = between.lstrip()
        control = max((token for token in controls if visible.startswith(token)), key=len, default="")
        self._is_closed = bool(control)
        self.end = between[: len(between) - len(visible)] + control
        self._next = between[len(self.end) :] if control else between
        if not control:
            self.end = str(tokenizer.eos_token)
            self.notes.append(
                f"the chat template closes a reply with no control token, so {self.end} follows each reply"
            )
        self._before_reply, self.lead = self._prompt_of_reply()
        if _EMPTY_THOUGHT.search(self._before_reply):
            self.notes.append("thinking is off: each reply follows an empty thought, in training and in generation")
        self._checked: set[int] = set()
        for exchanges in range(1, _EXCHANGES + 1):
            self._check(exchanges)

    def frames(self, speakers: tuple[str, ...]) -> list[str]:
        """One string before the persona and one before each turn, without `lead` and `end`.

        Args:
            speakers: of the turns, partner or self in turn, a partner first.

        Raises:
            KestrelError: the template rewrites what it wrote before.
        """
        self._check((len(speakers) + 1) // 2)
        before = {"partner": self._next, "self": self._before_reply}
        return [*self._first, *(before[speaker] for speaker in speakers[1:])]

    def _prompt_of_reply(self) -> tuple[str, str]:
        """What stands before a reply, and the white space with which the reply begins."""
        speakers = ("partner", "self") * 2
        written = self._around(speakers)[-2]
        prompt = self._around(speakers[:-1], prompt=True)[-1]
        self._begins_replies = prompt != self._around(speakers[:-1])[-1]
        if not self._begins_replies:
            frame, lead = written, ""
        elif written.startswith(prompt) and not written[len(prompt) :].strip():
            frame, lead = prompt, written[len(prompt) :]
        elif _without_thoughts(prompt).rstrip() == _without_thoughts(written).rstrip():
            if _EMPTY_THOUGHT.search(prompt) and "</think>" not in prompt:  # DeepSeek's distills begin a thought
                prompt = prompt.rstrip() + "\n\n</think>\n\n"
            frame, lead = max(prompt, written, key=len), ""
        else:
            raise self._rewrites(prompt, written, "the prompt for a reply", "what precedes the finished reply")
        visible = frame.rstrip(" ")  # a blank belongs to the word that follows it, as tokenizers have it
        return visible, frame[len(visible) :] + lead

    def _check(self, exchanges: int) -> None:
        """Compares with the template's own rendering of so many exchanges, and of the prompt for the last reply."""
        if exchanges in self._checked:
            return
        end = self.end if self._is_closed else ""
        reply = self._before_reply + self.lead
        ours = f"{self._first[0]}{_mark(0)}{self._first[1]}{_mark(1)}"
        for number in range(2, 2 * exchanges, 2):
            ours += f"{reply}{_mark(number)}{end}{self._next}{_mark(number + 1)}"
        speakers = ("partner", "self") * exchanges
        if (speakers, False) not in self._rendered:
            self._run_all([(speakers, False), (speakers[:-1], True)])
        theirs = self._run(speakers, prompt=False).partition(_mark(2 * exchanges))[0]
        if _without_thoughts(ours + reply) != _without_thoughts(theirs):
            raise self._rewrites(theirs, ours + reply, "the whole dialogue", "message by message, each as the newest")
        prompt = self._run(speakers[:-1], prompt=True)
        if self._begins_replies and _without_thoughts(ours + reply).rstrip() != _without_thoughts(prompt).rstrip():
            raise self._rewrites(prompt, ours + reply, "the prompt for the last reply", "the dialogue up to it")
        self._checked.add(exchanges)

    def _around(self, speakers: tuple[str, ...], prompt: bool = False) -> list[str]:
        """What is written before the persona, before each turn, and after the last."""
        parts = _MARK.split(self._run(speakers, prompt))
        if [int(number) for number in parts[1::2]] != list(range(len(speakers) + 1)):
            raise KestrelError(f"the chat template leaves out, repeats or reorders messages; {_WAYS_OUT}")
        return parts[::2]

    def _takes_system_message(self) -> bool:
        """Whether a system message is written, and before the first user message."""
        longest = ("partner", "self") * _EXCHANGES
        wanted = [
            (longest[:count], prompt) for count in range(1, len(longest) + 1) for prompt in (False, count % 2 == 1)
        ]
        for takes_system in (True, False):
            self.takes_system = takes_system
            try:
                self._run_all(wanted)
                self._around(longest)
            except KestrelError:
                if not takes_system:
                    raise
            else:
                break
        return self.takes_system

    def _run(self, speakers: tuple[str, ...], prompt: bool) -> str:
        """The template's rendering of a dialogue with a mark for each text; `prompt`: with the beginning of a reply."""
        if (speakers, prompt) not in self._rendered:
            self._run_all([(speakers, prompt)])
        return self._rendered[speakers, prompt]

    def _run_all(self, wanted: list[tuple[tuple[str, ...], bool]]) -> None:
        """Runs the template for each of `wanted`, speakers and prompt, all in one process."""

        def render() -> str:
            return json.dumps([self._apply(*each) for each in wanted])

        try:
            texts = json.loads(limited(render, "the chat template"))
        except KestrelError as error:
            raise KestrelError(f"{error}; fix it, or {_WAYS_OUT}") from None
        self._rendered.update(zip(wanted, texts, strict=True))

    def _apply(self, speakers: tuple[str, ...], prompt: bool) -> str:
        messages = [
            {"role": "user" if speaker == "partner" else "assistant", "content": _mark(number)}
            for number, speaker in enumerate(speakers, start=1)
        ]
        if self.takes_system:
            messages.insert(0, {"role": "system", "content": _mark(0)})
        else:
            messages[0]["content"] = f"{_mark(0)}\n\n{_mark(1)}"
        return str(
            self._tokenizer.apply_chat_template(
                messages, chat_template=self._source, tokenize=False, add_generation_prompt=prompt, **_NO_THINKING
            )
        )

    def _rewrites(self, before: str, after: str, name_before: str, name_after: str) -> KestrelError:
        """The error for two renderings that should agree, with their difference."""
        one, other = (_MARK.sub(_named, text).split("\n") for text in (before, after))
        difference = difflib.unified_diff(one, other, name_before, name_after, lineterm="", n=1)
        return KestrelError(
            "the chat template writes a reply's prompt differently once the reply or what follows it is known, so the model "
            "would train on another prompt than it generates from:\n  "
            + "\n  ".join(difference)
            + f"\n{_WAYS_OUT[0].upper()}{_WAYS_OUT[1:]}"
        )


def _mark(number: int) -> str:
    """A placeholder for a text while the template runs, of private-use characters, which no template writes."""
    return f"\ue000{number}\ue001"


def _named(mark: re.Match[str]) -> str:
    number = int(mark[1])
    if number == 0:
        return "[persona]"
    return f"[{'user' if number % 2 else 'reply'} {(number + 1) // 2}]"


def _without_thoughts(text: str) -> str:
    return _EMPTY_THOUGHT.sub("", text)
