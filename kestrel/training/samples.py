"""The model's answers to a few fixed validation contexts, to be read while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from kestrel.config.settings import Settings
from kestrel.data.dataset import dialogue_of
from kestrel.generation.answers import question_row
from kestrel.generation.respond import greedy, respond
from kestrel.model.base import check_context
from kestrel.prompt.prompt import Prompt
from kestrel.runtime.atomic import write_atomically
from kestrel.runtime.output import json_visible

if TYPE_CHECKING:
    from datasets import Dataset


class Samples(TrainerCallback):
    """Answers one context of each of the first validation dialogues at each evaluation; for the first process.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """

    def __init__(self, model: torch.nn.Module, prompt: Prompt, rows: Dataset, settings: Settings):
        self._model, self._prompt, self._generation = model, prompt, greedy(settings.generation)
        self._path = Path(settings.run_dir) / "samples.jsonl"
        self._contexts, self._questions = [], []
        for dialogue in map(dialogue_of, rows.select(range(min(settings.training.samples, len(rows))))):
            replies = list(dialogue.replies())
            turn, _ = replies[len(replies) // 2]
            self._contexts.append(prompt.context(dialogue, turn))
            self._questions.append(question_row(dialogue, turn))
        check_context(model, max(map(len, self._contexts), default=0), settings.generation.max_new_tokens)

    def rows(self) -> list[dict[str, Any]]:
        """`question_row` of each context, with response and stopped_by."""
        was_training = self._model.training
        responses = respond(self._model, self._prompt, self._contexts, self._generation)
        self._model.train(was_training)
        return [
            {**row, "response": response.text, "stopped_by": response.stopped_by}
            for row, response in zip(self._questions, responses, strict=True)
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        copy = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self._path.name
        with write_atomically(self._path, "wb") as file:
            file.write(copy.read_bytes() if copy.exists() else b"")

    def on_evaluate(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        rows = ({"step": state.global_step, **row} for row in self.rows())
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json_visible(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
