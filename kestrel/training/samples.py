"""The model's answers to a few fixed validation contexts, to be read while it trains."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from kestrel.config.settings import Settings
from kestrel.data.dataset import dialogue_of
from kestrel.generation.answers import question_row
from kestrel.generation.respond import greedy, respond
from kestrel.model.base import check_context
from kestrel.prompt.prompt import Prompt, Unrenderable
from kestrel.runtime.atomic import write_atomically
from kestrel.runtime.output import json_visible

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 2  # samples on a terminal


class Samples(TrainerCallback):
    """Answers one context of each of the first validation dialogues at each evaluation; for the first process.

    Args:
        write_text: takes a name, a text in Markdown and a step, for TensorBoard.

    Raises:
        KestrelError: a context and its answer are longer than the model's context.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompt: Prompt,
        rows: Dataset,
        settings: Settings,
        write_text: Callable[[str, str, int], None],
    ):
        self._model, self._prompt, self._generation = model, prompt, greedy(settings.generation)
        self._write_text = write_text
        self._path = Path(settings.run_dir) / "samples.jsonl"
        self._contexts, self._questions = [], []
        for dialogue in map(dialogue_of, rows.select(range(min(settings.training.samples, len(rows))))):
            replies = list(dialogue.replies())
            # An exchange may be longer than prompt.max_length; the last one fits.
            for turn, _ in replies[len(replies) // 2 :]:
                with contextlib.suppress(Unrenderable):
                    self._contexts.append(prompt.context(dialogue, turn))
                    self._questions.append(question_row(dialogue, turn))
                    break
        check_context(model, max(map(len, self._contexts), default=0), settings.generation.max_new_tokens)

    def rows(self) -> list[dict[str, Any]]:
        """`question_row` of each context, with response and stopped_by."""
        was_training, rows = self._model.training, []
        questions = zip(self._questions, self._contexts, strict=True)
        for row, context in tqdm(questions, "samples", len(self._contexts), disable=None, leave=False):
            response = respond(self._model, self._prompt, [context], self._generation)[0]
            rows.append({**row, "response": response.text, "stopped_by": response.stopped_by})
        self._model.train(was_training)
        return rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        copy = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self._path.name
        with write_atomically(self._path, "wb") as file:
            file.write(copy.read_bytes() if copy.exists() else b"")

    def on_evaluate(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        rows = [{"step": state.global_step, **row} for row in self.rows()]
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json_visible(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
        for row in rows:
            said = "\n".join(f"> {turn['text']}\n" for turn in row["history"][-1:])
            text = f"{said}\n{row['response']}\n\nreference: {row['reference']}"
            self._write_text(f"samples/{row['dialogue_id']}", text, state.global_step)
        if sys.stdout.isatty():
            for row in rows[:_SHOWN]:
                said = "".join(f"“{turn['text']}” → " for turn in row["history"][-1:])
                line = f"{said}“{row['response']}”"
                tqdm.write("  " + shorten(line, shutil.get_terminal_size().columns - 3, placeholder="…"))
            sys.stdout.flush()
