"""Token by token after computed prefixes: greedy or sampled, by the library's rules.

Rows that have ended leave the batch. Each row has draws of its own, so that neither its batch nor an interruption changes
a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from kestrel.config.settings import Generation
from kestrel.generation.passes import next_logits
from kestrel.generation.prefix_batch import PrefixBatch
from kestrel.generation.stop_strings import StopStrings

_CHECK_EVERY = 4  # steps on a GPU: seeing its tokens means waiting for it
_DROP_BELOW = 0.8  # share of active rows at which dropping the others is worth a copy of the rest
_ROWS_AT_ONCE = 256  # rows whose probabilities are sorted and summed in float32 together
_NO_TOKEN = -1


def pad_left(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """int64 (rows, longest)."""
    tensors = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")


def decode(
    model: torch.nn.Module,
    rows: PrefixBatch,
    contexts: Sequence[Sequence[int]],
    settings: Generation,
    end_ids: Collection[int],
    draws: np.ndarray | None = None,
    stops: StopStrings | None = None,
    on_end: Callable[[int], object] = int,
) -> list[list[int]]:
    """Continues each context, greedily or by its draws.

    Args:
        model: in evaluation mode.
        rows: each context without its last token, with space for max_new_tokens more.
        contexts: token ids.
        settings: without beams.
        end_ids: tokens that end a row.
        draws: float64 (rows, max_new_tokens) in [0, 1), where settings.do_sample.
        on_end: called with how many more rows have ended.

    Returns:
        Token ids of each row; those after its end mean nothing.
    """
    device = rows.lengths.device
    every = 1 if device.type == "cpu" else _CHECK_EVERY
    choose = _TokenChooser(contexts, settings, draws, device)
    tokens = torch.full((len(contexts), settings.max_new_tokens), min(end_ids), device=device)
    active = torch.arange(len(contexts), device=device)  # index of the context of each row that is left
    ends, ended = torch.tensor(sorted(end_ids)), torch.zeros(len(contexts), dtype=torch.bool)
    last = torch.tensor([context[-1] for context in contexts], device=device)
    running = len(contexts)
    for done in range(1, settings.max_new_tokens + 1):
        last = choose(next_logits(model, rows, last, done - 1), done - 1)
        tokens[active, done - 1] = last
        if done % every or done == settings.max_new_tokens:
            continue
        checked = max(0, done - every - (stops.tail if stops else 0))
        recent = tokens[active, checked:done].cpu()
        ended |= torch.isin(recent, ends).any(dim=1)
        if stops:
            for row in (~ended).nonzero()[:, 0].tolist():
                ended[row] = stops.are_in(recent[row].tolist())
        left = (~ended).nonzero()[:, 0]
        on_end(running - len(left))
        running = len(left)
        if running == 0:
            break
        if len(left) <= _DROP_BELOW * len(ended):
            ended = ended[left]
            left = left.to(device)
            active, last = active[left], last[left]
            rows.keep(left)
            choose.keep(left)
    on_end(running)
    return _on_the_host(tokens)


def _on_the_host(tokens: torch.Tensor) -> list[list[int]]:
    ids: list[list[int]] = tokens.tolist()
    return ids


class _TokenChooser:
    """The next token of each row."""

    def __init__(
        self, contexts: Sequence[Sequence[int]], settings: Generation, draws: np.ndarray | None, device: torch.device
    ):
        from transformers import (
            NoRepeatNGramLogitsProcessor,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._penalty = self._no_repeat = None
        if settings.repetition_penalty != 1.0:
            self._penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        if settings.no_repeat_ngram_size:
            self._no_repeat = NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size)
        self._warpers: list[Any] = []
        if settings.do_sample:
            if settings.temperature not in (None, 1.0):
                self._warpers.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k is not None:
                self._warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p is not None and settings.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(settings.top_p))
        # In (0, 1], so that a draw never falls on a token of probability zero.
        self._draws = None if draws is None else torch.from_numpy(1.0 - draws).float().to(device)
        self._seen: torch.Tensor | None = None
        if self._penalty or self._no_repeat:
            seen = pad_left(contexts, _NO_TOKEN)
            self._length = seen.shape[1]
            self._seen = torch.nn.functional.pad(seen, (0, settings.max_new_tokens), value=_NO_TOKEN).to(device)

    def __call__(self, logits: torch.Tensor, done: int) -> torch.Tensor:
        """int64 (rows,) from logits (rows, vocabulary), after `done` tokens."""
        if self._seen is None and self._draws is None:
            return logits.argmax(dim=-1)
        parts = torch.arange(len(logits), device=logits.device).split(_ROWS_AT_ONCE)
        chosen = torch.cat([self._chosen(logits[part].float(), part, done) for part in parts])
        if self._seen is not None:
            self._seen[:, self._length + done] = chosen
        return chosen

    def _chosen(self, scores: torch.Tensor, rows: torch.Tensor, done: int) -> torch.Tensor:
        if self._seen is not None:
            seen = self._seen[rows, : self._length + done]
            # Processors that look at single tokens get a token of the row as padding.
            tokens = seen.where(seen != _NO_TOKEN, seen[:, -1:])
            if self._penalty:
                scores = self._penalty(tokens, scores)
            if self._no_repeat:
                # In longer n-grams padding on the left is only where none is ever completed.
                scores = self._no_repeat(tokens if self._no_repeat.ngram_size == 1 else seen, scores)
        if self._draws is None:
            return scores.argmax(dim=-1)
        for warper in self._warpers:
            scores = warper(None, scores)
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
        return torch.searchsorted(cumulative, self._draws[rows, done, None] * cumulative[:, -1:])[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        if self._seen is not None:
            self._seen = self._seen[rows]
        if self._draws is not None:
            self._draws = self._draws[rows]
