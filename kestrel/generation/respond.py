"""Answers to prompts, each with the reason why it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from kestrel.config.settings import Generation
from kestrel.generation.decoding import decode, pad_left
from kestrel.generation.prefix_cache import Prefixes, compute_prefixes, supports_prefixes
from kestrel.generation.stop_strings import StopStrings
from kestrel.model.base import check_context
from kestrel.model.budget import Budget
from kestrel.model.likelihood import SpanRequest
from kestrel.model.loss import causal_lm_of
from kestrel.prompt.prompt import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig

_TOKENS_OF_SAMPLES = 8192
StoppedBy = Literal["eos", "length", "stop_string"]


@dataclass(frozen=True)
class Response:
    """One answer: its text without what ended it, and its tokens up to and including the end token or stop string."""

    text: str
    tokens: int
    stopped_by: StoppedBy

    def as_row(self) -> dict[str, Any]:
        return {"response": self.text, "stopped_by": self.stopped_by, "response_tokens": self.tokens}


@dataclass(frozen=True)
class Request:
    """A context to answer.

    Attributes:
        ids: token ids.
        sequence: index of the computed sequence that begins with them.
        seed: for sampling; this answer's draws depend on it alone.
    """

    ids: Sequence[int]
    sequence: int
    seed: int = 0


def greedy(settings: Generation) -> Generation:
    """The settings with greedy search: neither sampling nor beams."""
    off = dict.fromkeys(("temperature", "top_p", "top_k", "length_penalty"))
    return settings.model_copy(update={**off, "do_sample": False, "num_beams": 1})


def generation_config(settings: Generation, prompt: Prompt) -> GenerationConfig:
    """The library's configuration, built from the settings alone."""
    from transformers import GenerationConfig

    others = sorted(prompt.end_ids - {prompt.end_id})
    chosen: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "num_beams": settings.num_beams,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "eos_token_id": [prompt.end_id, *others] if others else prompt.end_id,
        "pad_token_id": prompt.end_id,
        "use_cache": True,
    }
    if settings.do_sample:
        chosen |= {"temperature": settings.temperature or 1.0, "top_p": settings.top_p or 1.0}
        chosen["top_k"] = settings.top_k or 0
    if settings.num_beams > 1:
        chosen["length_penalty"] = 1.0 if settings.length_penalty is None else settings.length_penalty
    return GenerationConfig(**chosen)


def respond(
    model: torch.nn.Module,
    prompt: Prompt,
    contexts: Sequence[Sequence[int]],
    settings: Generation,
    seeds: Sequence[int] = (),
) -> list[Response]:
    """Answers contexts.

    Args:
        model: with or without its adapter switched on; it is left in evaluation mode.
        contexts: token ids of each prompt.
        seeds: one per answer, for sampling.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """
    check_context(model, max(map(len, contexts), default=0), settings.max_new_tokens)
    seeds = seeds or [0] * len(contexts)
    requests = [Request(ids, index, seed) for index, (ids, seed) in enumerate(zip(contexts, seeds, strict=True))]
    responses: dict[int, Response] = {}
    if decodes_from_prefixes(model, settings, max(map(len, contexts), default=0)):
        sequences, budget = [SpanRequest(ids, []) for ids in contexts], budget_of(model, settings)
        for prefixes, _ in compute_prefixes(model, sequences, budget):
            responses |= respond_from_prefixes(model, prompt, prefixes, requests, settings, budget)
    else:
        responses |= respond_with_library(model, prompt, requests, settings)
    return [responses[index] for index in range(len(requests))]


def budget_of(model: torch.nn.Module, settings: Generation, made: Budget | None = None) -> Budget:
    """What a batch of answers may take; the one that was made before, if there is one.

    The library draws its samples for a whole batch, so there a batch must not depend on the machine.
    """
    by_library = settings.do_sample and not decodes_from_prefixes(model, settings)
    fixed = _TOKENS_OF_SAMPLES if by_library and settings.tokens_per_step == "auto" else settings.tokens_per_step
    return made or Budget(model, fixed)


def decodes_from_prefixes(model: torch.nn.Module, settings: Generation, longest: float = math.inf) -> bool:
    """Whether Kestrel decodes. The library's `generate` does beams, and models that cannot share prefixes.

    Args:
        longest: tokens of the longest sequence, and of the longest candidate.
    """
    return settings.num_beams == 1 and supports_prefixes(model, longest + settings.max_new_tokens)


@torch.no_grad()
def respond_from_prefixes(
    model: torch.nn.Module,
    prompt: Prompt,
    prefixes: Prefixes,
    requests: Sequence[Request],
    settings: Generation,
    budget: Budget | None = None,
    on_end: Callable[[int], object] = int,
) -> Iterator[tuple[int, Response]]:
    """Answers the requests whose sequence is among the prefixes, in batches of similar length, the longest first. As answers end, `on_end` is
    called with how many.

    Yields:
        Index in `requests`, and the response.
    """
    mine = [index for index, request in enumerate(requests) if prefixes.holds(request.sequence)]
    mine.sort(key=lambda index: -len(requests[index].ids))
    causal_lm: Any = causal_lm_of(model)
    logits = causal_lm.config.get_text_config().vocab_size * causal_lm.dtype.itemsize
    allowed, stops = budget_of(model, settings, budget), StopStrings(prompt, settings.stop_strings)

    def fitting(left: Sequence[int]) -> int:
        width = len(requests[left[0]].ids) + settings.max_new_tokens
        # A row takes its share of the cache and one row of logits.
        memory = allowed.continuation_memory(prefixes.bytes_per_token)
        most = max(1, memory // (width * prefixes.bytes_per_token + logits))
        # Batches of equal size: a small last one would take as long as a large one.
        return math.ceil(len(left) / math.ceil(len(left) / most))

    def run(indices: Sequence[int]) -> list[list[int]]:
        batch, draws = [requests[index] for index in indices], None
        if settings.do_sample:
            draws = np.stack([np.random.default_rng(r.seed).random(settings.max_new_tokens) for r in batch])
        copies = prefixes.copy_rows([(r.sequence, len(r.ids) - 1) for r in batch], settings.max_new_tokens)
        return decode(model, copies, [r.ids for r in batch], settings, prompt.end_ids, draws, stops, on_end)

    for indices, rows in allowed.in_batches(mine, fitting, run):
        for index, row in zip(indices, rows, strict=True):
            yield index, _response(row, prompt, stops)


@torch.no_grad()
def respond_with_library(
    model: torch.nn.Module,
    prompt: Prompt,
    requests: Sequence[Request],
    settings: Generation,
    budget: Budget | None = None,
) -> Iterator[tuple[int, Response]]:
    """Answers requests with the library's `generate`, in batches of similar length padded on the left.

    A batch is sampled from the seed of its first request.

    Yields:
        Index in `requests`, and the response.
    """
    model.eval()
    device, stops = next(model.parameters()).device, StopStrings(prompt, settings.stop_strings)
    allowed = budget_of(model, settings, budget)

    def run(indices: Sequence[int]) -> list[list[int]]:
        contexts = [requests[index].ids for index in indices]
        ids = pad_left(contexts, prompt.end_id)
        mask, longest = pad_left([[1] * len(context) for context in contexts], 0), ids.shape[1]

        def is_over(sequences: torch.Tensor) -> list[bool]:
            """Which rows, of a batch or of its beams, have just spelled a stop string; all before was looked at."""
            recent = sequences[:, max(longest, sequences.shape[1] - stops.tail - 1) :]
            return [stops.are_in(row) for row in recent.tolist()]

        if settings.do_sample:
            torch.manual_seed(requests[indices[0]].seed)
        config = generation_config(settings, prompt)
        rows = generate(model, config, ids.to(device), mask.to(device), is_over if stops else None)
        return [list(row) for row in rows[:, longest:].tolist()]

    lengths = [len(request.ids) + settings.max_new_tokens for request in requests]
    for indices, rows in allowed.passes(lengths, run):
        for index, row in zip(indices, rows, strict=True):
            yield index, _response(row, prompt, stops)


def generate(
    model: torch.nn.Module,
    config: GenerationConfig,
    ids: torch.Tensor,
    mask: torch.Tensor,
    is_over: Callable[[torch.Tensor], list[bool]] | None,
) -> torch.Tensor:
    """The library's `generate` by the given configuration alone.

    Args:
        ids, mask: int64 (rows, tokens), padded on the left.
        is_over: returns, after each token, which rows of int64 (rows, tokens so far) have ended.

    Returns:
        int64 (rows, tokens), prompts included.
    """
    from transformers import StoppingCriteriaList

    def criterion(sequences: torch.Tensor, scores: Any, **extra: Any) -> torch.Tensor:
        return torch.tensor(is_over(sequences) if is_over else False, device=sequences.device)

    causal_lm: Any = causal_lm_of(model)
    # What a configuration leaves open, `generate` takes from the model's own (a repetition penalty, suppressed tokens),
    # which would change the result silently. So ours replaces the model's own during this call.
    own, causal_lm.generation_config = causal_lm.generation_config, config
    try:
        generated: torch.Tensor = causal_lm.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([criterion] if is_over else []),
        )
    finally:
        causal_lm.generation_config = own
    return generated


def _response(ids: list[int], prompt: Prompt, stops: StopStrings) -> Response:
    """Ends a row at its first end token or at a stop string; the rest is padding."""
    end = next((place for place, token in enumerate(ids) if token in prompt.end_ids), None)
    ended, ids = end is not None, ids[:end]
    if (cut := stops.cut(ids)) is not None:
        return Response(*cut, "stop_string")
    return Response(prompt.reply_text(ids), len(ids) + ended, "eos" if ended else "length")
