"""A conversation as HTML, in which whatever is said is text."""

from __future__ import annotations

import html
from collections.abc import Sequence

from kestrel.chat.conversation import Exchange

# Of the templates that a page library may run over a value, none begins without one of these.
_TEMPLATES = str.maketrans({char: f"&#{ord(char)};" for char in "${}`@%\\"})

# The container is reversed, so that a browser keeps its end in sight while an answer grows. Gradio (6) writes an
# overflow of its own into the element, over which only what is important goes.
CSS = """
#transcript {height: min(560px, 64vh); overflow-y: auto !important; display: flex; flex-direction: column-reverse;
  padding: 4px 22px 18px; background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius)}
#transcript:has(.nothing) {justify-content: center}
#transcript .html-container {padding: 0}
#transcript p {margin: 0; padding: 9px 14px; border-radius: 14px; white-space: pre-wrap; overflow-wrap: anywhere;
  line-height: 1.45; width: fit-content; max-width: 100%; border: 1px solid transparent}
#transcript .message {margin: 14px 0 12px auto; max-width: 78%; border-bottom-right-radius: 3px;
  background: var(--button-primary-background-fill); color: var(--button-primary-text-color)}
#transcript .answers {display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 16px; max-width: 100%}
#transcript .who {font-size: 12px; color: var(--body-text-color-subdued); margin: 0 0 3px 3px}
#transcript .answer p {border-bottom-left-radius: 3px; color: var(--body-text-color);
  background: var(--background-fill-secondary); border-color: var(--border-color-primary)}
#transcript .answer.talks p {border-color: var(--primary-600);
  background: color-mix(in srgb, var(--primary-600) 14%, var(--block-background-fill))}
#transcript .nothing {color: var(--body-text-color-subdued); padding: 0 12%; text-align: center}
"""


def as_text(text: str) -> str:
    """HTML, and nothing to any template, that shows the text as it is."""
    return html.escape(text).translate(_TEMPLATES)


def transcript(exchanges: Sequence[Exchange], busy: bool = False) -> str:
    """Each message with its answer, and the other system's answer beside it where that was asked.

    Args:
        exchanges: in order.
        busy: whether the last answer is still being made, which a screen reader then waits for.
    """
    if not exchanges:
        return '<div class="nothing">Say something. The model answers as the person of this persona.</div>'
    return f'<div role="log" aria-busy="{str(busy).lower()}">{"".join(map(_exchange, exchanges))}</div>'


def _exchange(said: Exchange) -> str:
    answers = {said.system: said.reply, **said.beside}
    shown = "".join(
        f'<div class="answer {system}{" talks" if system == said.system else ""}">'
        f'<div class="who">{system}</div><p>{as_text(text) or "…"}</p></div>'
        for system, text in answers.items()
    )
    return f'<p class="message">{as_text(said.message)}</p><div class="answers">{shown}</div>'
