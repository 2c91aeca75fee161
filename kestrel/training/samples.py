"""The model's answers to a few fixed validation contexts, to be read while it trains."""

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
    """Returns a function that answers one context of each of the first validation dialogues, greedily.

    It returns a row per context: dialogue_id, turn, persona, history, reference, response, stopped_by.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """
    contexts, facts = [], []
    for source in rows.select(range(min(settings.training.samples, len(rows)))):
        dialogue = dialogue_of(source)
        replies = list(dialogue.replies())
        turn, reference = replies[len(replies) // 2]
        contexts.append(prompt.context(dialogue, turn))
        facts.append(
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
            {**row, "response": response.text, "stopped_by": response.stopped_by}
            for row, response in zip(facts, responses, strict=True)
        ]

    return answer
