"""Answers to prompts: batched, left-padded, cut by token count, each with the reason why it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from kestrel.batching import batches_within
from kestrel.loss import causal_lm_of
from kestrel.model import check_context
from kestrel.prompt import Prompt
from kestrel.settings import Generation

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


def batches_of(contexts: Sequence[Sequence[int]], settings: Generation) -> list[np.ndarray]:
    """Positions of the contexts of each batch: similar lengths, within the token budget, longest first."""
    lengths = np.asarray([len(ids) + settings.max_new_tokens for ids in contexts], dtype=np.int64)
    return list(batches_within(lengths, settings.tokens_per_step)) if len(contexts) else []


@torch.no_grad()
def respond(
    model: torch.nn.Module, prompt: Prompt, contexts: Sequence[Sequence[int]], settings: Generation
) -> list[Response]:
    """Answers one batch of contexts.

    Args:
        model: the causal LM, with or without its adapter switched on; it is left in evaluation mode.
        prompt: of the run.
        contexts: token ids of each prompt.
        settings: of generation.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """
    from transformers import StoppingCriteriaList

    model.eval()
    longest = max(len(ids) for ids in contexts)
    check_context(model, longest, settings.max_new_tokens)
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


def in_batches(
    model: torch.nn.Module, prompt: Prompt, contexts: Sequence[Sequence[int]], settings: Generation, seed: Sequence[int]
) -> Iterator[tuple[np.ndarray, list[Response]]]:
    """Answers all contexts, batch after batch.

    Args:
        seed: of sampling; each batch draws from a stream of its own, so that an interrupted run repeats what it drew.

    Yields:
        Positions of the contexts and their responses.
    """
    for number, positions in enumerate(batches_of(contexts, settings)):
        if settings.do_sample:
            torch.manual_seed(int(np.random.SeedSequence([*seed, number]).generate_state(1, np.uint64)[0] >> 1))
        yield positions, respond(model, prompt, [contexts[i] for i in positions], settings)
