"""How others use what is published: an example of the prompt, and the templates of READMEs and of a program."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.evaluation import markdown
from kestrel.prompt.limits import limited
from kestrel.prompt.prompt import Prompt

EXAMPLE = Dialogue("example", ("i have two dogs.", "i work nights."), (Turn("partner", "hi ! any pets ?"),))


@dataclass(frozen=True)
class PromptExample:
    """A prompt in the run's format.

    Attributes:
        format: plain, chat or original.
        pieces: its text; each piece is tokenized on its own.
        first_ids: token ids before the first piece, such as a beginning-of-sequence token.
        end_id: the token that ends a reply.
        messages: the prompt as chat messages, where the tokenizer's own template makes the same tokens of them.
        switches: what the template has to be called with.
    """

    format: str
    pieces: list[str]
    first_ids: list[int]
    end_id: int
    messages: list[dict[str, str]] | None = None
    switches: dict[str, bool] = field(default_factory=dict)


def example_prompt(prompt: Prompt) -> PromptExample:
    """The prompt of a short invented dialogue.

    Raises:
        KestrelError: tokenizing the pieces one by one does not give the prompt's token ids.
    """
    turns = (*EXAMPLE.turns, Turn("self", "ok"))
    segments = prompt.segments(Dialogue(EXAMPLE.dialogue_id, EXAMPLE.persona, turns))
    pieces = [segment.text for segment in segments[:-2]]
    ids = prompt.open_context(EXAMPLE)
    # Tokenizers that put a blank before a text (SentencePiece's) need the whole in one piece.
    for cut in (pieces, ["".join(pieces)]):
        tokenized = [prompt.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in cut]
        from_pieces = [token for piece_ids in tokenized for token in piece_ids]
        first_ids = ids[: len(ids) - len(from_pieces)]
        if first_ids + from_pieces == ids:
            return PromptExample(prompt.format, cut, first_ids, prompt.end_id, *_as_messages(prompt, ids))
    raise KestrelError("the card's example would not be tokenized as in training; please report the tokenizer's name")


def _as_messages(prompt: Prompt, ids: list[int]) -> tuple[list[dict[str, str]] | None, dict[str, bool]]:
    """The messages of which `apply_chat_template` makes these tokens, and the switches that it takes; None where it makes
    others: a template that writes today's date, or a blank that belongs to the next word."""
    messages = prompt.messages(EXAMPLE)
    if messages is None or "strftime_now" in prompt.tokenizer.get_chat_template():
        return None, {}

    def tokens(switches: dict[str, Any]) -> str:
        asked = {"add_generation_prompt": True, "return_dict": False, **switches}
        return json.dumps(prompt.tokenizer.apply_chat_template(messages, **asked))

    for switches in ({}, {"enable_thinking": False}, {"thinking": False}):
        if json.loads(limited(partial(tokens, switches), "the chat template")) == ids:
            return messages, switches
    return None, {}


def render(template: str, **values: Any) -> str:
    """A text from `templates/`, without the line break at its end."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "markdown": lambda value: markdown.escape(str(value)),
        "code_block": _code_block,
        "table": lambda table: markdown.table(table.columns, table.rows, align="---"),
        "exp": math.exp,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
    }
    return environment.get_template(f"{template}.jinja").render(values)


def _code_block(text: str, language: str) -> str:
    """A fenced block that its content cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`*", text))))
    return f"{fence}{language}\n{text}\n{fence}"
