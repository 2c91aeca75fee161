"""The conversation as a page: persona, messages, adapter and base side by side, sampling, export. Needs Gradio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from kestrel.chat import transcript
from kestrel.chat.conversation import Conversation, Exchange, System, sentences
from kestrel.chat.speaker import Speaker
from kestrel.errors import KestrelError
from kestrel.settings import Generation

# Fonts of the machine: a page that fetches one from elsewhere tells that somebody is here.
THEME = gr.themes.Soft(
    primary_hue="emerald",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = (
    transcript.CSS
    + """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
footer {display: none !important}
"""
)


@dataclass
class Session:
    """What one open page is in the middle of.

    Attributes:
        conversation: its persona and exchanges.
        stopped: whether the answer that is being made is to end here.
        told_of_cut: whether the user knows that old turns are left out.
    """

    conversation: Conversation
    stopped: bool = False
    told_of_cut: bool = False


def other(system: str) -> System:
    return "base" if system == "adapter" else "adapter"


def chosen_of(settings: Generation, sample: bool, temperature: float, top_p: float, top_k: int, new: int) -> Generation:
    """The run's settings with what the page's controls say."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": int(top_k) or None}
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
        conversation = session.conversation
        if not message.strip():
            raise gr.Error("There is no message.", print_exception=False)
        try:
            wanted = sentences(persona.splitlines(), "the persona")
            if wanted != conversation.persona:
                if conversation.exchanges:
                    gr.Info("Another person, so a new conversation.")
                self._begin(session, wanted)
            context, cut = self.speaker.context(conversation.dialogue(message))
        except KestrelError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if cut and not session.told_of_cut:
            gr.Info(f"The first {cut} turns no longer fit into the prompt; the oldest are left out from here on.")
            session.told_of_cut = True
        session.stopped = False
        exchange = Exchange(message, talks, "")
        chosen = chosen_of(self.settings, *controls)
        for system in (talks, other(talks)) if beside else (talks,):
            with closing(self.speaker.answer(context, system, chosen)) as answer:
                for text in answer:
                    if system == talks:
                        exchange = replace(exchange, reply=text)
                    else:
                        exchange = replace(exchange, beside={system: text})
                    yield "", session, transcript.transcript([*conversation.exchanges, exchange], busy=True), gr.skip()
                    if session.stopped:
                        break
        if exchange.reply:
            conversation.exchanges.append(exchange)
        else:
            gr.Warning("The answer is empty: it ended before it began. Your message is taken back.")
        yield "" if exchange.reply else message, *self._shown(session)

    def stop(self, session: Session) -> None:
        session.stopped = True

    def undo(self, session: Session) -> tuple[Any, ...]:
        """Takes back the last message, into the box where it was typed, and its answers."""
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
        return "", *self._shown(session)

    def _begin(self, session: Session, persona: tuple[str, ...]) -> None:
        session.conversation.reset(persona)
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
            with gr.Row():
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
                        placeholder="Say something", show_label=False, submit_btn=True, stop_btn=True, autofocus=True,
                        elem_id="message",
                    )  # fmt: skip
                    with gr.Row():
                        undo = gr.Button("Undo", elem_id="undo")
                        reset = gr.Button("New conversation", elem_id="reset")
                        export = gr.DownloadButton("Export as JSONL", interactive=False, elem_id="export")
            shown = [message, session, said, export]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            message.submit(self.send, [message, session, persona, talks, beside, *controls], shown, **quiet)
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
