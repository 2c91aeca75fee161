"""The conversation as a page: persona, messages, adapter and base side by side, sampling, export. Needs Gradio."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from kestrel.chat import transcript
from kestrel.chat.conversation import Conversation, Exchange, System, sentences
from kestrel.chat.streaming import EMPTY, Speaker
from kestrel.config.settings import Generation
from kestrel.errors import KestrelError

# Fonts of the machine: a page that fetches one from elsewhere tells that somebody is here. The darker shades, because
# white or grey on Gradio's own is hard to read.
THEME = gr.themes.Soft(
    primary_hue="emerald",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    button_secondary_background_fill_hover_dark="*neutral_500",
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*neutral_600",
    block_title_text_color_dark="*neutral_300",
    block_title_text_weight="600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    slider_color="*primary_700",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
# On a narrow screen the conversation comes before what it can be told. An answer is either asked for or stopped.
CSS = (
    transcript.CSS
    + """
.gradio-container, .gradio-container main {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
footer {display: none !important}
@media (max-width: 760px) {
  #columns {flex-direction: column-reverse; flex-wrap: nowrap}
  #columns > * {width: 100%}
  #transcript {height: 56vh}
}
.gradio-container:not(:has([aria-busy=true])) #message .stop-button {display: none}
.gradio-container:has([aria-busy=true]) #message .submit-button {display: none}
"""
)


@dataclass
class Session:
    """What one open page is in the middle of.

    Attributes:
        conversation: its persona and exchanges; begun anew, another one.
        answering: set to end the answer that is being made; None while there is none.
        taken_back: whether the message that is being answered is to be forgotten.
        told_of_cut: whether the user knows that old turns are left out.
    """

    conversation: Conversation
    answering: threading.Event | None = None
    taken_back: bool = False
    told_of_cut: bool = False


def chosen_of(settings: Generation, sample: bool, temperature: float, top_p: float, top_k: int, new: int) -> Generation:
    """The run's settings with what the page's controls say."""
    # A browser has one kind of number; transformers refuses a temperature of 2 that is not 2.0.
    sampling = {"temperature": float(temperature), "top_p": float(top_p), "top_k": int(top_k) or None}
    nothing = dict.fromkeys(sampling)
    # Beams and sampling exclude each other.
    beams = {"num_beams": 1, "length_penalty": None} if sample else {}
    return settings.model_copy(
        update={"do_sample": sample, "max_new_tokens": int(new), **(sampling if sample else nothing), **beams}
    )


class Page:
    """The page's events. Each returns what the components show next.

    Args:
        speaker: the model.
        persona: that a page begins with.
        settings: what its controls begin with.
        folder: for exported files.
    """

    def __init__(self, speaker: Speaker, persona: tuple[str, ...], settings: Generation, folder: Path):
        self.speaker, self.persona, self.settings, self.folder = speaker, persona, settings, folder

    def send(
        self, message: str, session: Session, persona: str, talks: System, beside: bool, *controls: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Answers a message: the talking system first, then, if it is shown, the other one over the same prompt."""
        if not message.strip():
            raise gr.Error("There is no message.", print_exception=False)
        if session.answering is not None:
            raise gr.Error("Another answer is being made; wait for its end, or stop it.", print_exception=False)
        try:
            wanted = sentences(persona.splitlines(), "the persona")
            if wanted != session.conversation.persona:
                if session.conversation.exchanges:
                    gr.Info("Another person, so a new conversation.")
                self._begin(session, wanted)
            conversation = session.conversation
            context, cut = self.speaker.context(conversation.dialogue(message))
        except KestrelError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if cut and not session.told_of_cut:
            gr.Info(f"The first {cut} turns no longer fit into the prompt; the oldest are left out from here on.")
            session.told_of_cut = True
        stop = session.answering = threading.Event()
        session.taken_back = False
        began = exchange = Exchange(message, talks, "")
        try:
            chosen = chosen_of(self.settings, *controls)
            for exchange in self.speaker.exchange(began, context, beside, chosen, stop):
                now = transcript.transcript([*conversation.exchanges, exchange], busy=True)
                # Of the box only the message is taken: what is typed meanwhile is the next one.
                yield gr.skip() if exchange.reply else "", session, now, gr.skip()
                if stop.is_set():
                    break
        except Exception as error:  # noqa: BLE001  of many types, and the page is to live on
            yield message, *self._shown(session)  # else the page would wait for the rest of the answer
            raise gr.Error(f"There is no answer: {error}", print_exception=False) from None
        finally:
            session.answering = None
        forgotten = session.taken_back or session.conversation is not conversation
        if exchange.reply and not forgotten:
            conversation.exchanges.append(exchange)
        elif not forgotten and not stop.is_set():
            gr.Warning(f"{EMPTY.capitalize()}.")
        back = session.conversation is conversation and (forgotten or not exchange.reply)
        yield message if back else gr.skip(), *self._shown(session)

    def stop(self, session: Session) -> None:
        if session.answering is not None:
            session.answering.set()

    def undo(self, session: Session) -> tuple[Any, ...]:
        """Takes back the last message, into the box where it was typed, and its answers."""
        if session.answering is not None:  # `send` does the rest
            session.taken_back = True
            session.answering.set()
            return (gr.skip(),) * 4
        if not session.conversation.exchanges:
            raise gr.Error("There is nothing to take back.", print_exception=False)
        message = session.conversation.exchanges.pop().message
        return message, *self._shown(session)

    def reset(self, session: Session, persona: str) -> tuple[Any, ...]:
        """Begins anew, as the person that the page describes."""
        try:
            self._begin(session, sentences(persona.splitlines(), "the persona"))
        except KestrelError as error:
            raise gr.Error(str(error), print_exception=False) from None
        self.stop(session)
        return "", *self._shown(session)

    def _begin(self, session: Session, persona: tuple[str, ...]) -> None:
        session.conversation = Conversation(persona)
        session.told_of_cut = False

    def _shown(self, session: Session) -> tuple[Any, ...]:
        conversation = session.conversation
        if not conversation.exchanges:
            return session, transcript.transcript([]), gr.DownloadButton(value=None, interactive=False)
        file = self.folder / f"{conversation.dialogue_id}.jsonl"
        file.write_text(json.dumps(conversation.as_row(), ensure_ascii=False) + "\n", encoding="utf-8")
        everything = transcript.transcript(conversation.exchanges)
        return session, everything, gr.DownloadButton(value=str(file), interactive=True)

    # -- layout --------------------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        """Components, and which event leads where."""
        both = len(self.speaker.systems) == 2
        with gr.Blocks(title="Kestrel", analytics_enabled=False) as page:
            session = gr.State(Session(Conversation(self.persona)))
            gr.Markdown("# Kestrel")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=1, min_width=290):
                    persona = gr.Textbox(
                        "\n".join(self.persona), label="Persona, one sentence a line", lines=5, max_lines=12,
                        elem_id="persona",
                    )  # fmt: skip
                    with gr.Group(visible=both):
                        talks = gr.Radio(
                            list(self.speaker.systems),
                            value=self.speaker.systems[0],
                            label="Who talks",
                            elem_id="talks",
                        )
                        beside = gr.Checkbox(False, label="ask both, side by side", elem_id="beside")
                    controls = self._controls()
                with gr.Column(scale=3):
                    said = gr.HTML(transcript.transcript([]), elem_id="transcript", apply_default_css=False)
                    message = gr.Textbox(
                        placeholder="Say something", label="Message", show_label=False, submit_btn=True, stop_btn=True,
                        autofocus=True, max_lines=6, elem_id="message",
                    )  # fmt: skip
                    with gr.Row():
                        undo = gr.Button("Undo", size="sm", min_width=90, elem_id="undo")
                        reset = gr.Button("Start over", size="sm", min_width=90, elem_id="reset")
                        export = gr.DownloadButton(
                            "Export", size="sm", min_width=90, interactive=False, elem_id="export"
                        )
            shown = [message, session, said, export]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            # Without a limit: the speaker lets them answer one after the other, and each shows meanwhile what it was told.
            said_to = [message, session, persona, talks, beside, *controls]
            message.submit(self.send, said_to, shown, concurrency_limit=None, **quiet)
            message.stop(self.stop, [session], None, queue=False, **quiet)
            undo.click(self.undo, [session], shown, **quiet)
            reset.click(self.reset, [session, persona], shown, **quiet)
        return page

    def _controls(self) -> list[Any]:
        """Sampling, with the run's settings to begin with; what has no effect without it shows with it."""
        chosen = self.settings
        with gr.Group():
            longest = min(max(256, chosen.max_new_tokens), self.speaker.most_new_tokens)
            new = gr.Slider(1, longest, chosen.max_new_tokens, step=1, label="max_new_tokens", elem_id="new")
            sample = gr.Checkbox(chosen.do_sample, label="sample, not the likeliest token", elem_id="sample")
            sliders = [
                gr.Slider(0.05, 2, chosen.temperature or 1.0, step=0.05, label="temperature", visible=chosen.do_sample),
                gr.Slider(0.05, 1, chosen.top_p or 1.0, step=0.05, label="top_p", visible=chosen.do_sample),
                gr.Slider(0, 200, chosen.top_k or 0, step=1, label="top_k (0: all)", visible=chosen.do_sample),
            ]
        sample.change(
            lambda on: [gr.Slider(visible=on)] * len(sliders), [sample], sliders, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        return [sample, *sliders, new]
