"""Whether replies contradict the persona, by a model of natural language inference that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from kestrel.batching import batches_within
from kestrel.errors import KestrelError
from kestrel.evaluation.generations import Reply
from kestrel.hub import plain_loading_errors

Value = Literal[-1, 0, 1]
_VALUES: dict[str, Value] = {
    "contradict": -1,
    "neutral": 0,
    "entail": 1,
}  # by how the name of a label begins, in any case
_LONGEST = 512  # tokens of a pair
_TOKENS = {"cpu": 4096, "cuda": 65536}  # of a batch


class NliModel:
    """Labels pairs of a reply (the premise) and a sentence of the persona (the hypothesis).

    Args:
        name: `evaluation.nli`: id on the Hub or folder of a sequence classifier of transformers.

    Raises:
        KestrelError: it cannot be loaded, or its configuration does not name the three labels.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        with plain_loading_errors("model", name, key="evaluation.nli"):
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            # Pairs are padded by batch, after they were sorted by length; the library advises against it on stderr.
            self._tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
            self._model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).eval()
        self._values = _values_of(name, self._model.config.id2label)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._known: dict[tuple[str, str], Value] = {}

    def judge(self, replies: Sequence[Reply]) -> list[Reply]:
        """The replies with `nli` for each that has a persona; equal pairs are computed once."""
        pairs = {(r.response, sentence) for r in replies if r.response.strip() for sentence in r.persona or ()}
        self._label(sorted(pairs - self._known.keys()))
        return [
            replace(r, nli=tuple(self._known.get((r.response, sentence), 0) for sentence in r.persona))
            if r.persona
            else r
            for r in replies
        ]

    @torch.no_grad()
    def _label(self, pairs: Sequence[tuple[str, str]]) -> None:
        if not pairs:
            return
        encoded = self._tokenizer(
            [one for one, _ in pairs], [two for _, two in pairs], truncation=True, max_length=self._longest()
        )
        lengths = np.asarray([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)
        with tqdm(total=len(pairs), desc="evaluation.nli", unit=" pairs", disable=None) as bar:
            for rows in batches_within(lengths, _TOKENS[self._device.type]):
                batch = {key: [values[row] for row in rows] for key, values in encoded.items()}
                inputs = self._tokenizer.pad(batch, return_tensors="pt").to(self._device)
                labels = self._model(**inputs).logits.argmax(dim=-1).tolist()
                self._known |= {pairs[row]: self._values[label] for row, label in zip(rows, labels, strict=True)}
                bar.update(len(rows))

    def _longest(self) -> int:
        positions = getattr(self._model.config, "max_position_embeddings", None) or _LONGEST
        return min(_LONGEST, self._tokenizer.model_max_length, positions)


def _values_of(name: str, labels: Mapping[int, str]) -> dict[int, Value]:
    """By the index of a label: 1 for entailment, 0 for neutral, -1 for contradiction."""
    values = {
        int(index): value
        for index, label in labels.items()
        for word, value in _VALUES.items()
        if str(label).lower().startswith(word)
    }
    if len(labels) != len(_VALUES) or sorted(values.values()) != sorted(_VALUES.values()):
        raise KestrelError(
            f"evaluation.nli {name}: its configuration has the labels {', '.join(map(str, labels.values()))}; expected "
            "three that begin with entail, neutral and contradict. Correct id2label in its config.json, or name "
            "another model"
        )
    return values
