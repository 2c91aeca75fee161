"""The web page: persona, adapter and base in a column each, sampling, export. Needs Gradio."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from kestrel.chat.conversation import Conversation, Exchange, System
from kestrel.chat.persona import split_sentences
from kestrel.chat.streaming import EMPTY_ANSWER, ChatModel
from kestrel.config.settings import Generation
from kestrel.errors import KestrelError

# The machine's own fonts: loading one from a server would tell that server who chats. The darker shades give the text
# the contrast that Gradio's own lack.
THEME = gr.themes.Soft(
    primary_hue="emerald",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    block_label_background_fill_dark="*primary_700",
    block_label_text_color="*primary_800",
    block_title_background_fill_dark="*primary_700",
    block_title_text_color="*primary_800",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
# On a narrow screen the conversation comes before the controls. The top panel holds a button
# that would clear a column but not the conversation.
CSS = """
.gradio-container main {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
@media (max-width: 760px) {
  #columns {flex-direction: column-reverse; flex-wrap: nowrap}
  #columns > * {width: 100%}
  .conversation {height: 50vh !important}
}
.conversation .top-panel {display: none}
.conversation .bubble-wrap {padding-top: 34px}
"""
# The browser makes the exported file itself, so the server stores no conversation.
_DOWNLOAD = """text => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
  link.download = JSON.parse(text).dialogue_id + '.jsonl';
  link.click();
}"""

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of every event


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
    """Shows a KestrelError as a message on the page."""
    try:
        yield
    except KestrelError as error:
        raise gr.Error(str(error), print_exception=False) from None


def generation_settings(
    settings: Generation, sample: bool, temperature: float, top_p: float, top_k: int, max_new_tokens: int
) -> Generation:
    """The run's settings with the values of the page's controls."""
    # JavaScript sends 2.0 as 2, and transformers refuses an integer temperature.
    sampling = {"temperature": float(temperature), "top_p": float(top_p), "top_k": int(top_k) or None}
    update = {**sampling, "num_beams": 1, "length_penalty": None} if sample else dict.fromkeys(sampling)
    return settings.model_copy(update={"do_sample": sample, "max_new_tokens": int(max_new_tokens), **update})


class Page:
    """The page's layout and event handlers; persona and settings are what a page opens with."""

    def __init__(self, model: ChatModel, persona: tuple[str, ...], settings: Generation):
        self.model, self.persona, self.settings = model, persona, settings

    def send(
        self, message: str, session: Session, persona: str, system: System, compare: bool, *controls: Any
    ) -> Iterator[list[Any]]:
        """Answers a message: first the chosen system, then, to compare, the other one on the same prompt."""
        with errors_on_page():
            if not message.strip():
                raise KestrelError("The message is empty.")
            if session.stop is not None:
                raise KestrelError("An answer is still in progress; wait for it, or stop it.")
            sentences = split_sentences(persona.splitlines(), "the persona")
            if sentences != session.conversation.persona:
                if session.conversation.exchanges:
                    gr.Info("The persona changed, so a new conversation starts.")
                self._start(session, sentences)
            conversation = session.conversation
            context, cut = self.model.context(conversation.dialogue(message))
        if cut and not session.warned_of_cut:
            gr.Info(f"The conversation no longer fits into the prompt; the oldest turns ({cut} now) are left out.")
            session.warned_of_cut = True
        self._announce_queue()
        stop = session.stop = threading.Event()
        session.undone = False
        exchange, settings = Exchange(message, system, ""), generation_settings(self.settings, *controls)
        answers = self.model.stream_exchange(exchange, context, compare, settings, stop)
        try:
            yield [gr.Textbox("", submit_btn=False, stop_btn=True), *self._columns(session, exchange)]
            for exchange in answers:
                # The message box is skipped: the user may already be typing the next message.
                yield [gr.skip(), *self._columns(session, exchange)]
                if stop.is_set():
                    break
        except Exception as error:  # noqa: BLE001  of many types, and the page must stay usable
            yield [_idle_box(value=message), *self._columns(session)]
            raise gr.Error(f"The model failed to answer: {error}", print_exception=False) from None
        finally:
            session.stop = None
        box = _idle_box()
        if session.conversation is conversation:  # the user has not started over
            if exchange.reply and not session.undone:
                conversation.exchanges.append(exchange)
            else:
                box = _idle_box(value=message)
                if not stop.is_set():
                    gr.Warning(f"{EMPTY_ANSWER.capitalize()}.")
        yield [box, *self._columns(session)]

    def _announce_queue(self) -> None:
        if self.model.is_busy:
            gr.Info("The model answers somebody else; your answer comes after that.")

    def stop(self, session: Session) -> None:
        if session.stop is not None:
            session.stop.set()

    def undo(self, session: Session) -> list[Any]:
        """Removes the last message with its answers, and puts the message back into the box."""
        if session.stop is not None:  # `send` then does the rest
            session.undone = True
            session.stop.set()
            return [gr.skip()] * (1 + len(self.model.systems))
        with errors_on_page():
            if not session.conversation.exchanges:
                raise KestrelError("No message to take back.")
        return [session.conversation.exchanges.pop().message, *self._columns(session)]

    def reset(self, session: Session, persona: str) -> list[Any]:
        """Starts a new conversation with the persona on the page."""
        with errors_on_page():
            self._start(session, split_sentences(persona.splitlines(), "the persona"))
        self.stop(session)
        return ["", *self._columns(session)]

    def export(self, session: Session) -> str:
        with errors_on_page():
            return json.dumps(session.conversation.as_row(), ensure_ascii=False) + "\n"

    def _start(self, session: Session, persona: tuple[str, ...]) -> None:
        session.conversation, session.warned_of_cut = Conversation(persona), False

    def _columns(self, session: Session, latest: Exchange | None = None) -> list[gr.Chatbot]:
        """A column for each system that has answered: its messages, and its answers."""
        exchanges = session.conversation.exchanges + ([latest] if latest else [])
        columns = []
        for name in self.model.systems:
            messages: list[Any] = [
                # Gradio (6.31) inserts a message as HTML even when it renders no Markdown. The dict keeps it from
                # stripping indentation.
                {"role": role, "content": {"type": "text", "text": html.escape(text or "…", quote=False)}}
                for exchange in exchanges
                if name in exchange.replies
                for role, text in (("user", exchange.message), ("assistant", exchange.replies[name]))
            ]
            is_empty_page = not exchanges and name == self.model.systems[0]
            columns.append(gr.Chatbot(messages, visible=bool(messages) or is_empty_page))
        return columns

    # -- layout --------------------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        """The components, and what each event calls."""
        systems = list(self.model.systems)
        with gr.Blocks(title="Kestrel", analytics_enabled=False) as page:
            session = gr.State(Session(Conversation(self.persona)))
            gr.Markdown("# Kestrel")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=1, min_width=290):
                    text = "\n".join(self.persona)
                    persona = gr.Textbox(text, label="Persona, one sentence a line", lines=5, elem_id="persona")
                    with gr.Group(visible=len(systems) > 1):
                        system = gr.Radio(systems, value=systems[0], label="Who answers", elem_id="system")
                        compare = gr.Checkbox(False, label="compare adapter and base", elem_id="compare")
                    controls = self._controls()
                with gr.Column(scale=3):
                    with gr.Row():
                        chats = [_chatbot(name, visible=name == systems[0]) for name in systems]
                    message = gr.Textbox(
                        placeholder="Say something", label="Message", show_label=False, submit_btn=True, stop_btn=False,
                        autofocus=True, max_lines=6, elem_id="message",
                    )  # fmt: skip
                    with gr.Row():
                        undo = gr.Button("Undo", size="sm", min_width=90, elem_id="undo")
                        reset = gr.Button("Start over", size="sm", min_width=90, elem_id="reset")
                        export = gr.Button("Export", size="sm", min_width=90, elem_id="export")
            exported = gr.Textbox(visible="hidden")
            shown = [message, *chats]
            asked = [message, session, persona, system, compare, *controls]
            # No limit here: the model answers one message at a time, and a page that waits still shows its message.
            message.submit(self.send, asked, shown, concurrency_limit=None, **_QUIET)
            message.stop(self.stop, [session], None, concurrency_limit=None, **_QUIET)
            undo.click(self.undo, [session], shown, **_QUIET)
            reset.click(self.reset, [session, persona], shown, **_QUIET)
            exporting = export.click(self.export, [session], [exported], **_QUIET)
            exporting.success(None, [exported], None, js=_DOWNLOAD, **_QUIET)
        return page

    def _controls(self) -> list[Any]:
        """The sampling controls, set to the run's settings; the sliders of sampling show only while it is on."""
        chosen = self.settings
        with gr.Group():
            longest = min(max(256, chosen.max_new_tokens), self.model.most_new_tokens)
            new = gr.Slider(1, longest, chosen.max_new_tokens, step=1, label="max_new_tokens", elem_id="new")
            sample = gr.Checkbox(chosen.do_sample, label="sample, not the likeliest token", elem_id="sample")
            with gr.Group(visible=chosen.do_sample) as sampling:
                sliders = [
                    gr.Slider(0.05, 2, chosen.temperature or 1.0, step=0.05, label="temperature"),
                    gr.Slider(0.05, 1, chosen.top_p or 1.0, step=0.05, label="top_p"),
                    gr.Slider(0, 200, chosen.top_k or 0, step=1, label="top_k (0: all)"),
                ]
        sample.change(lambda on: gr.Group(visible=on), [sample], [sampling], **_QUIET)
        return [sample, *sliders, new]


def _idle_box(**text: Any) -> gr.Textbox:
    """The message box ready for a message; `value` replaces what the user has typed into it."""
    return gr.Textbox(**text, submit_btn=True, stop_btn=False)


def _chatbot(system: System, visible: bool) -> gr.Chatbot:
    """A column in which everything is plain text: no Markdown, no HTML, no formulas."""
    return gr.Chatbot(
        label=system, visible=visible, elem_id=system, elem_classes="conversation", height="min(560px, 64vh)",
        render_markdown=False, latex_delimiters=[], allow_tags=False, sanitize_html=True, buttons=[],
        feedback_options=None, group_consecutive_messages=False, min_width=200,
        placeholder="Say something. The model answers as the owner of this persona.",
    )  # fmt: skip
