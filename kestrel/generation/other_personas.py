"""How likely references are under personas of other dialogues, which shows whether a model reads its persona at all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from kestrel.errors import KestrelError
from kestrel.model.budget import Given
from kestrel.model.likelihood import SpanRequest, span_nll
from kestrel.prompt.prompt import Prompt, Unrenderable

if TYPE_CHECKING:
    from datasets import Dataset

    from kestrel.dialogue import Dialogue

Persona = tuple[str, ...]


class Asked(Protocol):
    """What is needed of a `Question` of answers.py."""

    @property
    def dialogue(self) -> Dialogue: ...

    @property
    def turn(self) -> int: ...

    @property
    def span(self) -> tuple[int, int] | None: ...


def personas_of_others(dataset: Dataset, count: int, seed: int) -> list[list[Persona]]:
    """For each dialogue, `count` personas of other dialogues of the split, drawn by the dialogue's id and the seed.

    Raises:
        KestrelError: some dialogue does not have as many different personas beside it.
    """
    personas = [tuple(persona) for persona in dataset["persona"]]
    different = sorted({tuple(sorted(persona)): persona for persona in personas if persona}.values())
    drawn = []
    for name, persona in zip(dataset["dialogue_id"], personas, strict=True):
        # One more than needed, since its own may be among them.
        sample = random.Random(f"{seed} {name}").sample(different, min(count + 1, len(different)))
        others = [other for other in sample if sorted(other) != sorted(persona)][:count]
        if len(others) < count:
            raise KestrelError(
                f"generation.other_personas is {count}, but dialogue {name} can be given only {len(others)} personas of "
                "other dialogues; lower it, or answer more dialogues"
            )
        drawn.append(others)
    return drawn


def nll_under_others(
    model: torch.nn.Module,
    prompt: Prompt,
    by_dialogue: Sequence[Sequence[Asked]],
    others: Sequence[Sequence[Persona]],
    budget: Given,
) -> list[list[float]]:
    """Negative log-likelihood of each reference, in nats, under each other persona.

    A sequence holds all replies of a dialogue that its prompts share, so a persona costs one pass over the split.
    The prompts differ in nothing but the persona: where a longer one would cut other turns, a reply has no values.

    Args:
        model: prepared by `loss.attach_token_nll`.
        others: of each dialogue in `by_dialogue`, from `personas_of_others`.

    Returns:
        For each question, in order, a value for each of the other personas, or none at all.
    """
    values: list[list[float]] = [[] for questions in by_dialogue for _ in questions]
    requests: list[SpanRequest] = []
    answered: list[list[list[float]]] = []  # by each request, in the order of its spans
    unfilled = iter(values)
    for questions, personas in zip(by_dialogue, others, strict=True):
        pairs = [(question, next(unfilled)) for question in questions]
        together = [own for question, own in pairs if question.span is not None]
        views = [(questions[-1].dialogue, together)] if together else []
        for question, own in pairs:
            if question.span is None:
                turns = question.dialogue.turns[: question.turn + 1]
                views.append((replace(question.dialogue, turns=turns, candidates=()), [own]))
        for view, replies in views:
            as_given, *swapped = prompt.render_all([view, *(replace(view, persona=persona) for persona in personas)])
            rendered = [other for other in swapped if not isinstance(other, Unrenderable)]
            if isinstance(as_given, Unrenderable) or len(rendered) < len(personas):
                continue
            if all(other.first_turn == as_given.first_turn for other in rendered):
                requests += [SpanRequest(other.input_ids, other.reply_spans[-len(replies) :]) for other in rendered]
                answered += [replies] * len(rendered)
    for replies, scores in zip(answered, span_nll(model, requests, budget), strict=True):
        for own, (nll, _) in zip(replies, scores, strict=True):
            own.append(nll)
    return values
