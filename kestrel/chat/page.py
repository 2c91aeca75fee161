"""The web page's layout: persona, adapter and base in a column each, sampling, export. Needs Gradio."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr

from kestrel.chat.conversation import System
from kestrel.chat.page_events import Events, Session
from kestrel.chat.persona import saved_personas
from kestrel.chat.sampling import DEFAULTS

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


def blocks(events: Events) -> gr.Blocks:
    """The components, and what each event calls."""
    systems = list(events.model.systems)
    with gr.Blocks(title="Kestrel", analytics_enabled=False) as page:
        session = gr.State(Session(events.conversation))
        gr.Markdown(f"# Kestrel\n{_plain(events.model.title)}")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=1, min_width=290):
                text = "\n".join(events.conversation.persona.sentences)
                persona = gr.Textbox(text, label="Persona, one sentence a line", lines=5, elem_id="persona")
                _personas(events, persona)
                with gr.Group(visible=len(systems) > 1):
                    system = gr.Radio(systems, value=systems[0], label="Who answers", elem_id="system")
                    compare = gr.Checkbox(False, label="compare adapter and base", elem_id="compare")
                controls = _controls(events)
            with gr.Column(scale=3):
                with gr.Row():
                    chats = [_chatbot(name, *events.column(session.value, name)) for name in systems]
                message = gr.Textbox(
                    placeholder="Say something", label="Message", show_label=False, submit_btn=True, stop_btn=False,
                    autofocus=True, max_lines=6, elem_id="message",
                )  # fmt: skip
                note = gr.Markdown(elem_id="note")
                with gr.Row():
                    names = ("Regenerate", "Continue", "Undo", "Start over", "Export")
                    ids = ("retry", "continue", "undo", "reset", "export")
                    retry, go_on, undo, reset, export = (
                        gr.Button(label, size="sm", min_width=90, elem_id=id)
                        for label, id in zip(names, ids, strict=True)
                    )
                with gr.Accordion("Change a turn", open=False, elem_id="change"), gr.Row():
                    number = gr.Number(1, label="turn (1: your first message)", precision=0, minimum=1, min_width=160)
                    words = gr.Textbox(label="its new text (Enter)", scale=4, elem_id="words")
        exported = gr.Textbox(visible="hidden")
        shown = [message, note, *chats]
        asked = [message, session, persona, system, compare, *controls]
        # No limit here: the model answers one message at a time, and a page that waits still shows its message.
        message.submit(events.send, asked, shown, concurrency_limit=None, **_QUIET)
        message.stop(events.stop, [session], None, concurrency_limit=None, **_QUIET)
        retry.click(events.retry, [session, system, compare, *controls], shown, concurrency_limit=None, **_QUIET)
        asked_again = [number, words, session, system, compare, *controls]
        words.submit(events.edit, asked_again, shown, concurrency_limit=None, **_QUIET)
        go_on.click(events.go_on, [session, *controls], shown, concurrency_limit=None, **_QUIET)
        undo.click(events.undo, [session], shown, **_QUIET)
        reset.click(events.reset, [session, persona], shown, **_QUIET)
        exporting = export.click(events.export, [session], [exported], **_QUIET)
        exporting.success(None, [exported], None, js=_DOWNLOAD, **_QUIET)
    return page


def _personas(events: Events, persona: gr.Textbox) -> None:
    """Saved personas to choose from, a name to save one under, and another adapter; for the user of this machine."""
    with gr.Accordion("Saved personas and adapters", open=False, visible=events.is_private):
        names = saved_personas() if events.is_private else []  # also of what is not visible, the page has the names
        saved = gr.Dropdown(names, value=None, label="Take a saved persona", elem_id="saved")
        name = gr.Textbox(label="Save the persona under this name (Enter)", elem_id="keep")
        adapter = gr.Textbox(label="Answer by another adapter: folder or Hub id (Enter)", elem_id="adapter-name")
    if events.is_private:
        saved.input(events.take, [saved], [persona], **_QUIET)
        name.submit(events.keep, [name, persona], [saved], **_QUIET)
        adapter.submit(events.use_adapter, [adapter], None, **_QUIET)


def _controls(events: Events) -> list[Any]:
    """The sampling controls, set to the run's settings; the sliders of sampling show only while it is on."""
    chosen = events.settings
    with gr.Group():
        longest = min(max(256, chosen.max_new_tokens), events.model.most_new_tokens)
        new = gr.Slider(1, longest, chosen.max_new_tokens, step=1, label="max_new_tokens", elem_id="new")
        sample = gr.Checkbox(chosen.do_sample, label="sample, not the likeliest token", elem_id="sample")
        with gr.Group(visible=chosen.do_sample) as sampling:
            sliders = [
                gr.Slider(0.05, 2, chosen.temperature or DEFAULTS["temperature"], step=0.05, label="temperature"),
                gr.Slider(0.05, 1, chosen.top_p or DEFAULTS["top_p"], step=0.05, label="top_p"),
                gr.Slider(0, 200, chosen.top_k or 0, step=1, label="top_k (0: all)"),
            ]
        with gr.Accordion("More", open=False):
            more = [
                gr.Slider(1, 2, chosen.repetition_penalty, step=0.05, label="repetition_penalty (1: none)"),
                gr.Slider(0, 10, chosen.no_repeat_ngram_size, step=1, label="no_repeat_ngram_size (0: none)"),
                gr.Slider(1, 8, chosen.num_beams, step=1, label="num_beams, without sampling"),
            ]
    sample.change(lambda on: gr.Group(visible=on), [sample], [sampling], **_QUIET)
    return [sample, *sliders, new, *more]


def _plain(text: str) -> str:
    """Text without the signs that Markdown and HTML read."""
    return re.sub(r"([\\`*_{}\[\]()#+.!<>&|~-])", r"\\\1", text)


def _chatbot(system: System, messages: list[Any], is_visible: bool) -> gr.Chatbot:
    """A column in which everything is plain text: no Markdown, no HTML, no formulas."""
    return gr.Chatbot(
        messages, label=system, visible=is_visible, elem_id=system, elem_classes="conversation", height="min(560px, 64vh)",
        render_markdown=False, latex_delimiters=[], allow_tags=False, sanitize_html=True, buttons=[],
        feedback_options=None, group_consecutive_messages=False, min_width=200,
        placeholder="Say something. The model answers as the owner of this persona.",
    )  # fmt: skip
