"""The model's answers to a few fixed validation contexts, to be read while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kestrel.config.settings import Settings
from kestrel.data.dataset import dialogue_of
from kestrel.generation.answers import question_row
from kestrel.generation.respond import greedy, respond
from kestrel.model.base import check_context
from kestrel.prompt.prompt import Prompt

if TYPE_CHECKING:
    from datasets import Dataset


def sampler(
    model: torch.nn.Module, prompt: Prompt, rows: Dataset, settings: Settings
) -> Callable[[], list[dict[str, Any]]]:
    """Returns a function that answers one context of each of the first validation dialogues, greedily.

    It returns a row per context, as `question_row` with response and stopped_by.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """
    contexts, questions = [], []
    for row in rows.select(range(min(settings.training.samples, len(rows)))):
        dialogue = dialogue_of(row)
        replies = list(dialogue.replies())
        turn, _ = replies[len(replies) // 2]
        contexts.append(prompt.context(dialogue, turn))
        questions.append(question_row(dialogue, turn))
    check_context(model, max(map(len, contexts), default=0), settings.generation.max_new_tokens)

    def answer() -> list[dict[str, Any]]:
        was_training = model.training
        responses = respond(model, prompt, contexts, greedy(settings.generation))
        model.train(was_training)
        return [
            {**row, "response": response.text, "stopped_by": response.stopped_by}
            for row, response in zip(questions, responses, strict=True)
        ]

    return answer
