"""What the model says to a few fixed validation contexts, to be read while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kestrel.config.settings import Settings
from kestrel.data.dataset import dialogue_of
from kestrel.generation.respond import greedy, respond
from kestrel.model.base import check_context
from kestrel.prompt.prompt import Prompt

if TYPE_CHECKING:
    from datasets import Dataset


def sampler(
    model: torch.nn.Module, prompt: Prompt, rows: Dataset, settings: Settings
) -> Callable[[], list[dict[str, Any]]]:
    """Returns a function that answers the first contexts of validation, greedily, one from each dialogue.

    Each call returns a row a context: dialogue_id, turn, persona, history, reference, response, stopped_by.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """
    contexts, known = [], []
    for row in rows.select(range(min(settings.training.samples, len(rows)))):
        dialogue = dialogue_of(row)
        replies = list(dialogue.replies())
        turn, reference = replies[len(replies) // 2]
        contexts.append(prompt.context(dialogue, turn))
        known.append(
            {
                "dialogue_id": dialogue.dialogue_id,
                "turn": turn,
                "persona": list(dialogue.persona),
                "history": [{"speaker": t.speaker, "text": t.text} for t in dialogue.turns[:turn]],
                "reference": reference,
            }
        )
    check_context(model, max(map(len, contexts), default=0), settings.generation.max_new_tokens)

    def answer() -> list[dict[str, Any]]:
        was_training = model.training
        responses = respond(model, prompt, contexts, greedy(settings.generation))
        model.train(was_training)
        return [
            {**facts, "response": response.text, "stopped_by": response.stopped_by}
            for facts, response in zip(known, responses, strict=True)
        ]

    return answer
