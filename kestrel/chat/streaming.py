"""Answers that grow token by token, from the adapter or the base, and can be stopped at any moment."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch

from kestrel.chat.conversation import Exchange, System
from kestrel.config.settings import Generation
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.generation.respond import generate, generation_config
from kestrel.generation.stop_strings import StopStrings
from kestrel.prompt.prompt import TOO_LONG, Prompt, Unrenderable

_POLL_SECONDS = 0.1  # how often an answer that waits for the model checks whether it was stopped
EMPTY_ANSWER = "the answer is empty and your message was taken back: rephrase it, or sample"


class ChatModel:
    """The loaded model with the prompt that it was trained with.

    Args:
        prompt: its max_length leaves space for an answer in the model's context.
        systems: adapter and base, or base alone where no adapter is loaded.
    """

    def __init__(self, model: torch.nn.Module, prompt: Prompt, systems: Sequence[System]):
        self.model: Any = model.eval()
        self.prompt, self.systems = prompt, tuple(systems)
        self._one_at_a_time = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether an answer is in progress; the next one waits until it ends."""
        return self._one_at_a_time.locked()

    @property
    def most_new_tokens(self) -> int:
        """The longest answer that fits the model's context after any prompt."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        return int(limit) - self.prompt.max_length

    def context(self, dialogue: Dialogue) -> tuple[list[int], int]:
        """Token ids of the prompt after the last turn, exactly as in training, and how many of the oldest turns were
        left out to make it fit.

        Raises:
            KestrelError: persona and last message alone are too long, or a text spells a control token.
        """
        placeholder = replace(dialogue, turns=(*dialogue.turns, Turn("self", "ok")))
        try:
            rendered = self.prompt.render(placeholder)
        except Unrenderable as error:
            if error.reason == TOO_LONG:
                raise KestrelError(
                    f"persona and message together exceed the {self.prompt.max_length:,} tokens of a prompt "
                    "(prompt.max_length, or the model's context less generation.max_new_tokens); shorten them"
                ) from None
            raise KestrelError(f"{str(error).removeprefix(f'dialogue {dialogue.dialogue_id}: ')}; reword it") from None
        return rendered.input_ids[: rendered.reply_spans[-1][0]], rendered.first_turn

    def stream_exchange(
        self,
        exchange: Exchange,
        context: Sequence[int],
        compare: bool,
        settings: Generation,
        stop: threading.Event | None = None,
    ) -> Generator[Exchange, None, None]:
        """Yields an exchange as its reply grows and then, to compare, as the other system's answer grows."""
        for system in (exchange.system, *(s for s in self.systems if compare and s != exchange.system)):
            with contextlib.closing(self.stream_answer(context, system, settings, stop)) as answer:
                for text in answer:
                    grown: dict[str, Any] = {"reply": text} if system == exchange.system else {"beside": {system: text}}
                    exchange = replace(exchange, **grown)
                    yield exchange

    def stream_answer(
        self, context: Sequence[int], system: System, settings: Generation, stop: threading.Event | None = None
    ) -> Generator[str, None, None]:
        """Yields the answer so far, each time with more text; the last one is the whole answer.

        The model works in a thread of its own, so that the reader can be interrupted at any moment. When the reader
        closes the generator, the model stops after the current token. Of several beams, only the final answer is shown.

        Args:
            context: token ids from `context`.
            stop: set to end the answer, also while it still waits for another one to end.
        """
        texts: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()

        def stopped() -> bool:
            return closed.is_set() or (stop is not None and stop.is_set())

        def work() -> None:
            try:
                while not stopped():
                    if self._one_at_a_time.acquire(timeout=_POLL_SECONDS):
                        try:
                            self._generate(context, system, settings, texts.put, stopped)
                        finally:
                            self._one_at_a_time.release()
                        break
                texts.put(None)
            except BaseException as error:  # noqa: BLE001  raised again in the reader's thread
                texts.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (item := texts.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            worker.join()

    def _generate(
        self,
        context: Sequence[int],
        system: System,
        settings: Generation,
        show: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        shown, start, stops = "", len(context), StopStrings(self.prompt, settings.stop_strings)

        def rows_ended(sequences: torch.Tensor) -> list[bool]:
            """Shows the text so far."""
            nonlocal shown
            rows = [stops.text_so_far(row[start:]) for row in sequences.tolist()]
            if len(rows) == 1 and len(rows[0][0]) > len(shown):  # with several beams, none is the answer yet
                shown = rows[0][0]
                show(shown)
            return [ended or stopped() for _, ended in rows]

        ids = torch.tensor([context], device=next(self.model.parameters()).device)
        config = generation_config(settings, self.prompt)
        without_adapter = system == "base" and "adapter" in self.systems
        with self.model.disable_adapter() if without_adapter else contextlib.nullcontext():
            generated = generate(self.model, config, ids, torch.ones_like(ids), rows_ended)
        if not stopped():
            show(stops.text_so_far(generated[0, start:].tolist(), is_whole=True)[0])
