"""`generate.py --dry-run`: the memory that answering takes, without loading weights.

The code that answers runs on the meta device, over the split's own dialogues, and its allocations are counted. Passes and
batches that cannot raise the peak are not computed: only what they keep is allocated. No answer is assumed to end early.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from kestrel.config.settings import Generation, Settings
from kestrel.data.dataset import lengths_of
from kestrel.errors import KestrelError
from kestrel.generation import answers, decoding, prefix_cache, respond
from kestrel.generation.other_personas import personas_of_others
from kestrel.generation.prefix_batch import KeysAndValues, PrefixBatch
from kestrel.model import budget, dense_weights, likelihood
from kestrel.model.loss import token_nll
from kestrel.planning.dry_run import print_memory
from kestrel.planning.memory import (
    CONTEXT,
    WORKSPACE,
    Allocations,
    CannotEstimate,
    Estimator,
    Needed,
    Substitute,
    tensors_of,
)
from kestrel.planning.passes import available_memory
from kestrel.prompt.prompt import Prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

_REMEDY = "answer a few dialogues to see it: --generation.max_dialogues 50"
_LAST = 2  # steps of an answer that are computed: each holds its predecessor's logits


@dataclass(frozen=True)
class Answering(Needed):
    """Bytes on the device while answers are made, and the work."""

    base: int  # frozen weights and their quantization constants
    adapter: int  # LoRA's weights
    dense: int  # the base's weights once more, in the compute type
    kept: int  # keys and values at the peak
    momentary: int  # on top of that
    heaviest: str  # what is computed at the peak
    tokens: int  # of a pass
    side_by_side: int  # most answers that grow together
    replies: int
    done: Counter[str]  # passes and batches, by what they compute

    @property
    def peak(self) -> int:
        return self.base + self.adapter + self.dense + self.kept + self.momentary + self.workspace


class _Peak:
    """Stands for what computes, and computes on the meta device what may raise the peak.

    Whether it may is told by what another pass of its kind took for each position: within a kind the longest come first.
    """

    def __init__(self, counter: Allocations):
        self._counter = counter
        self._rates: dict[str, float] = {}  # bytes, by kind
        self._shapes: list[tuple[torch.Size, torch.Size]] = []  # of a layer's keys and values
        self.bytes = self.kept = self.side_by_side = 0
        self.heaviest, self.done = "", Counter[str]()

    def _compute(self, kind: str, rows: int, columns: int, work: Callable[[], object]) -> bool:
        """Runs it unless it cannot raise the peak; tells whether it ran."""
        counter, before = self._counter, self._counter.live
        self.done[kind] += 1
        self.bytes, counter.peak = max(self.bytes, counter.peak), before
        if before + self._rates.get(kind, np.inf) * rows * columns <= self.bytes:
            return False
        work()
        taken = (counter.peak - before) / (rows * columns)
        self._rates[kind] = max(self._rates.get(kind, 0), taken)
        if counter.peak > self.bytes:
            self.kept, self.heaviest = before, f"{kind}, {rows:,} x {columns:,} tokens"
        return True

    def whole_pass(
        self, own: Callable[..., tuple[KeysAndValues, Any]], model: Any, sequences: Sequence[Any]
    ) -> tuple[KeysAndValues, None]:
        rows, columns = _shape_of(sequences)
        made: KeysAndValues = []
        if self._compute("passes", rows, columns, lambda: made.extend(own(model, sequences)[0])):
            self._shapes = [(keys.shape, values.shape) for keys, values in made]
            self._dtype = made[0][0].dtype
            return made, None
        empty = functools.partial(torch.empty, dtype=self._dtype, device="meta")
        return [(empty(rows, k[1], columns, k[3]), empty(rows, v[1], columns, v[3])) for k, v in self._shapes], None

    def continuing_pass(self, own: Callable[..., object], model: Any, sequences: Sequence[Any], *after: Any) -> None:
        self._compute("batches of candidates", *_shape_of(sequences), lambda: own(model, sequences, *after))

    def decode(
        self,
        own: Callable[..., object],
        model: Any,
        rows: PrefixBatch,
        contexts: Sequence[Sequence[int]],
        settings: Generation,
        end_ids: Any,
        draws: np.ndarray | None,
        *_: Any,
    ) -> list[list[int]]:
        self.side_by_side = max(self.side_by_side, len(contexts))
        steps = min(_LAST, settings.max_new_tokens)

        def last_steps() -> None:
            before = settings.max_new_tokens - steps
            rows.width += before
            for layer in rows.cache.layers:
                layer.update(*(t.new_empty(*t.shape[:2], before, t.shape[3]) for t in (layer.keys, layer.values)))
            # An n-gram is looked for in the tokens, which are not there.
            changed = settings.model_copy(update={"max_new_tokens": steps, "no_repeat_ngram_size": 0})
            own(model, rows, contexts, changed, end_ids, None if draws is None else draws[:, :steps])

        self._compute("batches of answers", len(contexts), rows.width + settings.max_new_tokens, last_steps)
        return [[] for _ in contexts]

    def token_nll(self, own: Callable[..., object], model: Any, batch: dict[str, torch.Tensor]) -> None:
        rows, columns = batch["input_ids"].shape
        self._compute("passes with other personas", rows, columns, lambda: own(model, batch))

    def substitutes(self) -> list[Substitute]:
        """For `Estimator.on_shapes`."""
        computing: list[Substitute] = [
            (prefix_cache, "whole_pass", self.whole_pass), (prefix_cache, "continuing_pass", self.continuing_pass),
            (respond, "decode", self.decode), (likelihood, "token_nll", self.token_nll),
        ]  # fmt: skip
        no_scores = lambda requests, nll: [[(0.0, end - start) for start, end in one.spans] for one in requests]
        return [
            *((module, name, functools.partial(made, getattr(module, name))) for module, name, made in computing),
            *((module, "sums_by_span", no_scores) for module in (prefix_cache, likelihood)),
            (decoding, "_on_the_host", lambda tokens: None),
            (answers, "respond_with_library", _refuse),
        ]


def _shape_of(sequences: Sequence[Any]) -> tuple[int, int]:
    """Rows and columns."""
    return len(sequences), max(len(sequence.input_ids) for sequence in sequences)


def _refuse(*_: Any) -> NoReturn:
    raise CannotEstimate(
        "not estimated: transformers' generate makes these answers, because of generation.num_beams or of the model's attention; "
        + _REMEDY
    )


def estimate(
    settings: Settings, config: PretrainedConfig, prompt: Prompt, rows: Dataset, estimator: Estimator, memory: float
) -> Answering:
    """Memory at the peak of answering the rows, as `write_answers` does.

    Args:
        memory: bytes that base, adapter and all else may take.

    Raises:
        CannotEstimate: the architecture does not run on the meta device, or transformers decodes.
    """
    model, chosen = estimator.model("none").eval(), settings.generation
    held = estimator.base + estimator.adapter
    counter = Allocations(tensors_of(model, ()))
    peak, place = _Peak(counter), "cpu" if estimator.on_cpu else "cuda"
    left = lambda device: max(0, int((budget.OF_A_CPU if estimator.on_cpu else 1) * (memory - held - counter.live)))
    replaced = [
        (budget, "free_memory", left), (dense_weights, "free_memory", left),
        (budget, "MOST_TOKENS", dict.fromkeys(budget.MOST_TOKENS, budget.MOST_TOKENS[place])),
        *peak.substitutes(),
    ]  # fmt: skip
    others = personas_of_others(rows, chosen.other_personas, settings.seed) if chosen.other_personas else []
    lengths, done, replies = lengths_of(rows), 0, 0
    with estimator.on_shapes(_REMEDY, replaced), counter, torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        # The proof after loading; the fast layers keep copies of the adapter.
        token_nll(model, {"input_ids": ids, "labels": ids, "predicting": ids[0, :1]})
        before = counter.live
        with dense_weights.dense_weights(model) as is_dense:
            dense, allowed = (counter.live - before) * is_dense, respond.budget_of(model, chosen)
            while done < len(rows):
                end = done + answers.dialogues_of_shard(lengths[done:], allowed.tokens)
                asked = answers.questions_of([rows[i] for i in range(done, end)], prompt, settings.seed)
                made = answers.answer(model, prompt, asked, chosen, settings.seed, others[done:end], allowed)
                replies, done = replies + len(made), end
    peak.bytes = max(peak.bytes, counter.peak)
    kept = max(0, peak.kept - dense)
    return Answering(
        estimator.base, estimator.adapter, dense, kept, peak.bytes - dense - kept, peak.heaviest, allowed.tokens,
        peak.side_by_side, replies, peak.done, **estimator.around(),
    )  # fmt: skip


def report(settings: Settings, config: PretrainedConfig, prompt: Prompt, rows: Dataset) -> None:
    """Prints what answering the rows takes.

    Raises:
        KestrelError: it does not fit the GPU that was found or named, or this machine where there is none.
    """
    estimator = Estimator(settings, config, adapted="adapter" in settings.generation.systems)
    memory = available_memory(settings, is_planned=True)
    left: float = memory - CONTEXT - WORKSPACE
    if estimator.on_cpu:
        left = budget.free_memory(torch.device("cpu")) / budget.OF_A_CPU
    try:
        found = estimate(settings, config, prompt, rows, estimator, left)
    except CannotEstimate as error:
        print(f"memory: {error}")
        return
    parts = [
        (f"the base's weights once more, in {settings.quantization.compute_dtype}", found.dense),
        ("keys and values that are kept", found.kept),
        (f"more at the peak: {found.heaviest}", found.momentary),
    ]
    print_memory(settings, estimator, found, parts, memory)
    chosen = ", chosen for auto" if settings.generation.tokens_per_step == "auto" else ""
    print(f"\ngeneration.tokens_per_step: {found.tokens:,}{chosen}")
    done = ", ".join(f"{kind}: {count:,}" for kind, count in found.done.items())
    print(f"{found.replies:,} replies, of which at most {found.side_by_side:,} grow side by side; {done}")
    if found.needed > memory:
        raise KestrelError("answering does not fit; lower generation.tokens_per_step, and keep quantization.bits: 4")
