"""Answers to prompts, each with the reason why it ended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from kestrel.batching import batches_within
from kestrel.config.settings import Generation
from kestrel.generation.decoding import decode
from kestrel.generation.prefix_cache import Prefixes, computed, is_shareable, memory_for_rows
from kestrel.model.base import check_context
from kestrel.model.likelihood import SpanRequest
from kestrel.model.loss import causal_lm_of
from kestrel.prompt.prompt import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig

StoppedBy = Literal["eos", "length", "stop_string"]


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        text: without what ended it.
        tokens: generated tokens up to and including the end token or the stop string.
        stopped_by: eos, stop_string, or length where max_new_tokens ran out.
    """

    text: str
    tokens: int
    stopped_by: StoppedBy


def generation_config(settings: Generation, prompt: Prompt) -> GenerationConfig:
    """The library's configuration, built from the settings alone."""
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.do_sample,
        "num_beams": settings.num_beams,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "eos_token_id": prompt.end_id,
        "pad_token_id": prompt.end_id,
        "use_cache": True,
    }
    if settings.do_sample:
        chosen |= {
            "temperature": settings.temperature or 1.0,
            "top_p": settings.top_p or 1.0,
            "top_k": settings.top_k or 0,
        }
    if settings.num_beams > 1:
        chosen["length_penalty"] = 1.0 if settings.length_penalty is None else settings.length_penalty
    return GenerationConfig(**chosen)


@dataclass(frozen=True)
class Request:
    """A context that is to be answered.

    Attributes:
        ids: token ids.
        sequence: which of the computed sequences begins with them.
        seed: of sampling; the draws for this answer are made from it alone.
    """

    ids: Sequence[int]
    sequence: int
    seed: int = 0


def respond(
    model: torch.nn.Module,
    prompt: Prompt,
    contexts: Sequence[Sequence[int]],
    settings: Generation,
    seeds: Sequence[int] | None = None,
) -> list[Response]:
    """Answers contexts.

    Args:
        model: the causal LM, with or without its adapter switched on; it is left in evaluation mode.
        prompt: of the run.
        contexts: token ids of each prompt.
        settings: of generation.
        seeds: of each answer, where it is sampled; none draws it from torch's generator.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """
    if not contexts:
        return []
    check_context(model, max(map(len, contexts)), settings.max_new_tokens)
    if seeds is None:
        seeds = torch.randint(2**62, (len(contexts),)).tolist() if settings.do_sample else [0] * len(contexts)
    asked = [Request(ids, index, seed) for index, (ids, seed) in enumerate(zip(contexts, seeds, strict=True))]
    responses: list[Response | None] = [None] * len(asked)
    if not decodes_itself(model, settings):
        for index, response in by_the_library(model, prompt, asked, settings):
            responses[index] = response
    else:
        for held, _ in computed(model, [SpanRequest(ids, []) for ids in contexts], settings.tokens_per_step):
            for index, response in answers_behind(model, prompt, held, asked, settings):
                responses[index] = response
    return [response for response in responses if response is not None]


def decodes_itself(model: torch.nn.Module, settings: Generation) -> bool:
    """Whether Kestrel decodes: beams, and models that cannot share prefixes, are left to the library's `generate`."""
    return settings.num_beams == 1 and is_shareable(model)


@torch.no_grad()
def answers_behind(
    model: torch.nn.Module, prompt: Prompt, held: Prefixes, asked: Sequence[Request], settings: Generation
) -> Iterator[tuple[int, Response]]:
    """Answers those contexts whose sequence is held, in batches of similar length, the longest first.

    A row takes its share of the cache and one row of logits; together they take no more than a pass over
    tokens_per_step tokens.

    Yields:
        Positions in `asked`, and their responses.
    """
    left = [index for index, prompted in enumerate(asked) if held.holds(prompted.sequence)]
    left.sort(key=lambda index: -len(asked[index].ids))
    causal_lm: Any = causal_lm_of(model)
    logits = causal_lm.config.get_text_config().vocab_size * causal_lm.dtype.itemsize
    memory = memory_for_rows(model, held, settings.tokens_per_step)
    stops = _StopStrings(prompt, settings.stop_strings) if settings.stop_strings else None
    while left:
        width = len(asked[left[0]].ids) + settings.max_new_tokens
        fitting = max(1, memory // (width * held.bytes_a_token + logits))
        # Spread evenly over the batches that it takes, as a small last one would be as slow as a large one.
        size = math.ceil(len(left) / math.ceil(len(left) / fitting))
        positions, left = left[:size], left[size:]
        batch = [asked[position] for position in positions]
        draws = np.stack([_draws(p.seed, settings.max_new_tokens) for p in batch]) if settings.do_sample else None
        said = decode(
            model,
            held.behind([(p.sequence, len(p.ids) - 1) for p in batch], settings.max_new_tokens),
            [p.ids for p in batch],
            settings,
            prompt.end_id,
            draws,
            stops,
            stops.tail if stops else 0,
        )
        for position, row in zip(positions, said, strict=True):
            yield position, _cut(row, prompt, settings.stop_strings)


def _draws(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count)


def by_the_library(
    model: torch.nn.Module, prompt: Prompt, asked: Sequence[Request], settings: Generation
) -> Iterator[tuple[int, Response]]:
    """Answers contexts with the library's `generate`, in batches of similar length, each prompt computed on its own.

    A batch is sampled from the seed of its first context.

    Yields:
        Positions in `asked`, and their responses.
    """
    lengths = np.asarray([len(prompted.ids) + settings.max_new_tokens for prompted in asked], dtype=np.int64)
    for positions in batches_within(lengths, settings.tokens_per_step):
        if settings.do_sample:
            torch.manual_seed(asked[positions[0]].seed)
        responses = _generate(model, prompt, [asked[position].ids for position in positions], settings)
        yield from zip(positions.tolist(), responses, strict=True)


@torch.no_grad()
def _generate(
    model: torch.nn.Module, prompt: Prompt, contexts: Sequence[Sequence[int]], settings: Generation
) -> list[Response]:
    """One batch of `by_the_library`, padded on the left."""
    from transformers import StoppingCriteriaList

    model.eval()
    longest = max(len(ids) for ids in contexts)
    device = next(model.parameters()).device
    ids = torch.full((len(contexts), longest), prompt.end_id)
    mask = torch.zeros((len(contexts), longest), dtype=torch.long)
    for index, context in enumerate(contexts):
        ids[index, longest - len(context) :] = torch.as_tensor(context)
        mask[index, longest - len(context) :] = 1

    def stopped(sequences: torch.Tensor, scores: Any, **extra: Any) -> torch.Tensor:
        """Which rows (of a batch, or of its beams) have just spelled a stop string; bool (rows,)."""
        # A stop string of n bytes ends in the last token and spans at most n; what came before was looked at already.
        tail = max(len(stop.encode()) for stop in settings.stop_strings) + 1
        rows = sequences[:, max(longest, sequences.shape[1] - tail) :].tolist()
        texts = [_text_of(row, prompt) for row in rows]
        hits = [any(stop in text for stop in settings.stop_strings) for text in texts]
        return torch.tensor(hits, device=sequences.device)

    config = generation_config(settings, prompt)
    causal_lm: Any = causal_lm_of(model)
    # What a configuration leaves open, `generate` fills in from the model's own (a repetition penalty, suppressed
    # tokens), which would change the result in silence. So for this call the model's own is ours.
    own, causal_lm.generation_config = causal_lm.generation_config, config
    try:
        generated = causal_lm.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopped] if settings.stop_strings else []),
        )
    finally:
        causal_lm.generation_config = own
    return [_cut(row[longest:].tolist(), prompt, settings.stop_strings) for row in generated]


class _StopStrings:
    """Whether the last tokens of a row spell a stop string.

    Decoding thousands of rows again and again takes longer than a GPU takes for a token. A stop string can end only in a
    token that, alone, has its last character, or pieces of a character, or no text; most rows have none.

    Attributes:
        tail: tokens that the bytes of the longest stop string can spread over.
    """

    def __init__(self, prompt: Prompt, stop_strings: Sequence[str]):
        self._prompt, self._stop_strings = prompt, stop_strings
        self.tail = max(len(stop.encode()) for stop in stop_strings)
        self._may_end: dict[int, bool] = {}

    def __call__(self, ids: Sequence[int]) -> bool:
        for token in set(ids).difference(self._may_end):
            text = _text_of([token], self._prompt)
            # Some decoders take blanks from a token that stands alone.
            self._may_end[token] = (
                not text
                or "\N{REPLACEMENT CHARACTER}" in text
                or any(stop[-1] in text or stop[-1] == " " for stop in self._stop_strings)
            )
        if not any(self._may_end[token] for token in ids):
            return False
        text = _text_of(ids, self._prompt)
        return any(stop in text for stop in self._stop_strings)


def _text_of(ids: Sequence[int], prompt: Prompt) -> str:
    return str(prompt.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(ids: list[int], prompt: Prompt, stop_strings: Sequence[str]) -> Response:
    """Ends one row at its end token or at a stop string; what follows is padding that the batch needed."""
    ended = prompt.end_id in ids
    if ended:
        ids = ids[: ids.index(prompt.end_id)]
    stop = _first_stop(ids, prompt, stop_strings)
    if stop is not None:
        text, tokens = stop
        return Response(text, tokens, "stop_string")
    return Response(prompt.reply_text(ids), len(ids) + ended, "eos" if ended else "length")


def _first_stop(ids: list[int], prompt: Prompt, stop_strings: Sequence[str]) -> tuple[str, int] | None:
    """Text before the first stop string, and the number of tokens that first spell it whole."""
    whole = _text_of(ids, prompt)
    if not any(stop in whole for stop in stop_strings):
        return None
    for count in range(1, len(ids) + 1):
        text = _text_of(ids[:count], prompt)
        places = [text.find(stop) for stop in stop_strings if stop in text]
        if places:
            return text[: min(places)].strip(), count
    return None
