"""What the events of the web page do: answers that grow, and what is done with them afterwards. Needs Gradio."""

from __future__ import annotations

import html
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from kestrel.chat.conversation import Conversation, Exchange, System
from kestrel.chat.persona import persona_named, save_persona, saved_personas
from kestrel.chat.streaming import EMPTY_ANSWER, ChatModel
from kestrel.config.settings import Generation
from kestrel.data.persona_file import Persona, sentences_of
from kestrel.dialogue import Turn
from kestrel.errors import KestrelError


@dataclass
class Session:
    """The state of one open page.

    Attributes:
        conversation: starting over replaces it.
        stop: set to end the answer in progress; None when no answer is in progress.
        undone: whether the user took back the message that is being answered.
        warned_of_cut: whether the user knows that old turns are left out.
    """

    conversation: Conversation
    stop: threading.Event | None = None
    undone: bool = False
    warned_of_cut: bool = False


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Shows what went wrong as a message on the page. Gradio (6.31) would take markup in it for markup."""
    try:
        yield
    except KestrelError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None
    except Exception as error:  # noqa: BLE001  whatever a request of no page of ours brings, nothing of it is logged
        raise gr.Error(f"unexpected {type(error).__name__}", print_exception=False) from None


@contextmanager
def _restoring(conversation: Conversation, before: list[Exchange] | None) -> Iterator[None]:
    """Puts the exchanges back after an error, so that a refused event loses no turn; None leaves them as they are."""
    try:
        yield
    except Exception:
        if before is not None:
            conversation.exchanges[:] = before
        raise


def generation_settings(
    settings: Generation,
    sample: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    num_beams: int,
) -> Generation:
    """The run's settings with the values of the page's controls; sampling and beams exclude each other."""
    # JavaScript sends 2.0 as 2, and transformers refuses an integer temperature.
    sampling = {"temperature": float(temperature), "top_p": float(top_p), "top_k": int(top_k) or None}
    beams = 1 if sample else int(num_beams)
    update = {
        **(sampling if sample else dict.fromkeys(sampling)),
        "do_sample": sample,
        "max_new_tokens": int(max_new_tokens),
        "repetition_penalty": float(repetition_penalty),
        "no_repeat_ngram_size": int(no_repeat_ngram_size),
        "num_beams": beams,
        "length_penalty": settings.length_penalty if beams > 1 else None,
    }
    return settings.model_copy(update=update)


class Events:
    """What each event of the page does.

    Args:
        conversation: what a page opens with.
        is_private: whether the user of this machine alone can open it; it then saves personas and loads adapters.
    """

    def __init__(self, model: ChatModel, conversation: Conversation, settings: Generation, is_private: bool = True):
        self.model, self.conversation, self.settings, self.is_private = model, conversation, settings, is_private

    def send(
        self, message: str, session: Session, persona: str, system: System, compare: bool, *controls: Any
    ) -> Iterator[list[Any]]:
        """Answers a message: first the chosen system, then, to compare, the other one on the same prompt."""
        with errors_on_page():
            if not message.strip():
                raise KestrelError("The message is empty.")
            _require_idle(session)
            persona_now = _persona_of(persona, session)
            if persona_now is not session.conversation.persona:
                if session.conversation.exchanges:
                    gr.Info("The persona changed, so a new conversation starts.")
                self._start(session, persona_now)
            context = self._context(session, message)
        yield from self._answer(session, Exchange(message, system, ""), context, compare, controls)

    def retry(self, session: Session, system: System, compare: bool, *controls: Any) -> Iterator[list[Any]]:
        """Answers the last message again."""
        with errors_on_page():
            _require_idle(session)
            if not session.conversation.exchanges:
                raise KestrelError("No message to answer again.")
            before, last = list(session.conversation.exchanges), session.conversation.exchanges.pop()
            with _restoring(session.conversation, before):
                context = self._context(session, last.message)
        yield from self._answer(session, Exchange(last.message, system, ""), context, compare, controls, before)

    def go_on(self, session: Session, *controls: Any) -> Iterator[list[Any]]:
        """Continues the last answer, which was cut."""
        with errors_on_page():
            _require_idle(session)
            context, begun = self.model.continuation(session.conversation)
            before, last = list(session.conversation.exchanges), session.conversation.exchanges.pop()
        yield from self._answer(session, last, context, False, controls, before, begun)

    def edit(
        self, number: int, text: str, session: Session, system: System, compare: bool, *controls: Any
    ) -> Iterator[list[Any]]:
        """Changes a turn and drops what came after it; a changed message is answered again."""
        with errors_on_page():
            _require_idle(session)
            before = list(session.conversation.exchanges)
            with _restoring(session.conversation, before):
                message = session.conversation.edit(int(number), text)
                context = self._context(session, message) if message is not None else []
        if message is None:
            yield [gr.skip(), self._note(session), *self.columns(session)]
        else:
            yield from self._answer(session, Exchange(message, system, ""), context, compare, controls, before)

    def _context(self, session: Session, message: str) -> list[int]:
        context, cut = self.model.context(session.conversation.dialogue(Turn("partner", message)))
        if cut and not session.warned_of_cut:
            gr.Info(f"The conversation no longer fits into the prompt; the oldest turns ({cut} now) are left out.")
            session.warned_of_cut = True
        return context

    def _answer(
        self,
        session: Session,
        exchange: Exchange,
        context: Sequence[int],
        compare: bool,
        controls: Sequence[Any],
        before: list[Exchange] | None = None,
        begun: Sequence[int] = (),
    ) -> Iterator[list[Any]]:
        """Shows an exchange while it grows, and adds it to the conversation.

        Args:
            before: the exchanges to restore if there is no answer; None for a new message, which goes back into the box.
        """
        if self.model.is_busy:
            gr.Info("The model answers somebody else; your answer comes after that.")
        with errors_on_page(), _restoring(session.conversation, before):
            settings = generation_settings(self.settings, *controls)
        conversation, message, stop = session.conversation, exchange.message, threading.Event()
        session.stop, session.undone = stop, False
        answers = self.model.stream_exchange(exchange, context, compare, settings, stop, begun)
        failed = _idle_box(value=message) if before is None else _idle_box()
        try:
            empty = gr.Textbox("", submit_btn=False, stop_btn=True) if before is None else _busy_box()
            yield [empty, "", *self.columns(session, exchange)]
            for exchange in answers:  # noqa: PLR1704
                # The message box is skipped: the user may already be typing the next message.
                yield [gr.skip(), gr.skip(), *self.columns(session, exchange)]
                if stop.is_set():
                    exchange = replace(exchange, is_cut=True)
                    break
        except Exception as error:  # noqa: BLE001  of many types, and the page must stay usable
            conversation.exchanges[:] = conversation.exchanges if before is None else before
            yield [failed, "", *self.columns(session)]
            raise gr.Error(f"The model failed to answer: {html.escape(str(error))}", print_exception=False) from None
        finally:
            session.stop = None
        box = _idle_box()
        if session.conversation is conversation:  # the user has not started over
            if exchange.reply and not session.undone:
                conversation.exchanges.append(exchange)
            else:
                box = failed
                conversation.exchanges[:] = conversation.exchanges if before is None else before
                if not stop.is_set():
                    gr.Warning(f"{EMPTY_ANSWER.capitalize()}.")
        yield [box, self._note(session), *self.columns(session)]

    def _note(self, session: Session) -> str:
        """How long the last prompt and answer are, and whether the answer was cut."""
        if not session.conversation.exchanges:
            return ""
        cut = " · the answer was cut: Continue goes on" if session.conversation.exchanges[-1].is_cut else ""
        try:
            prompt, answer = self.model.tokens_of(session.conversation)
        except KestrelError:  # too long to go on
            return "the conversation no longer fits into the prompt"
        return f"prompt {prompt:,} of at most {self.model.prompt.max_length:,} tokens, answer {answer:,}{cut}"

    def stop(self, session: Session) -> None:
        if session.stop is not None:
            session.stop.set()

    def undo(self, session: Session) -> list[Any]:
        """Removes the last message with its answers, and puts the message back into the box."""
        if session.stop is not None:  # `send` then does the rest
            session.undone = True
            session.stop.set()
            return [gr.skip()] * (2 + len(self.model.systems))
        with errors_on_page():
            if not session.conversation.exchanges:
                raise KestrelError("No message to take back.")
        message = session.conversation.exchanges.pop().message
        return [message, self._note(session), *self.columns(session)]

    def reset(self, session: Session, persona: str) -> list[Any]:
        """Starts a new conversation with the persona on the page."""
        with errors_on_page():
            self._start(session, _persona_of(persona, session))
        self.stop(session)
        return ["", "", *self.columns(session)]

    def take(self, name: str) -> str:
        """A saved persona, for the page's persona."""
        with errors_on_page():
            return "\n".join(persona_named(name).sentences)

    def keep(self, name: str, persona: str) -> gr.Dropdown:
        """Saves the page's persona under a name."""
        with errors_on_page():
            save_persona(name, sentences_of(persona.splitlines(), "the persona"))
        return gr.Dropdown(saved_personas(), value=name)

    def use_adapter(self, name: str) -> None:
        """Answers by another adapter, on every open page."""
        with errors_on_page():
            gr.Info(html.escape(self.model.use_adapter(os.path.expanduser(name.strip()))))

    def export(self, session: Session) -> str:
        with errors_on_page():
            return json.dumps(session.conversation.as_row(), ensure_ascii=False) + "\n"

    def _start(self, session: Session, persona: Persona) -> None:
        session.conversation, session.warned_of_cut = Conversation(persona), False

    def columns(self, session: Session, latest: Exchange | None = None) -> list[gr.Chatbot]:
        """The columns of all systems, with an exchange that still grows."""
        columns = [self.column(session, name, latest) for name in self.model.systems]
        return [gr.Chatbot(messages, visible=is_visible) for messages, is_visible in columns]

    def column(self, session: Session, name: System, latest: Exchange | None = None) -> tuple[list[Any], bool]:
        """A system's column: the messages that it has answered, its answers, and whether the column is shown."""
        exchanges = session.conversation.exchanges + ([latest] if latest else [])
        answered = [(e.message, answers[name]) for e in exchanges if name in (answers := self._answers(e))]
        said = [(role, text) for pair in answered for role, text in zip(("user", "assistant"), pair, strict=True)]
        is_visible = bool(answered) or (not exchanges and name == self.model.systems[0])
        first = session.conversation.persona.first_message
        messages: list[Any] = [
            # Gradio (6.31) inserts a message as HTML even when it renders no Markdown. The dict keeps it from stripping
            # indentation.
            {"role": role, "content": {"type": "text", "text": html.escape(text or "…", quote=False)}}
            for role, text in ([("assistant", first)] if first and is_visible else []) + said
        ]
        return messages, is_visible

    def _answers(self, exchange: Exchange) -> dict[System, str]:
        """The answers of this page's systems; if there are none, the first column shows the answer of another one."""
        known = {name: text for name, text in exchange.replies.items() if name in self.model.systems}
        return known or {self.model.systems[0]: exchange.reply}


def _persona_of(text: str, session: Session) -> Persona:
    """The persona on the page: the conversation's, which may be empty, unless the words were changed."""

    def words(text: str) -> list[list[str]]:
        return [line.split() for line in text.splitlines() if line.strip()]

    now = session.conversation.persona
    if words(text) == words("\n".join(now.sentences)):
        return now
    return Persona(sentences_of(text.splitlines(), "the persona"))


def _idle_box(**text: Any) -> gr.Textbox:
    """The message box ready for a message; `value` replaces what the user has typed into it."""
    return gr.Textbox(**text, submit_btn=True, stop_btn=False)


def _busy_box() -> gr.Textbox:
    """The message box while an answer grows, with what the user has typed."""
    return gr.Textbox(submit_btn=False, stop_btn=True)


def _require_idle(session: Session) -> None:
    if session.stop is not None:
        raise KestrelError("An answer is still in progress; wait for it, or stop it.")
