"""Answers as they are made: token by token, from the adapter or the base, until they end or are told to stop."""

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

_LOOK_EVERY = 0.1  # seconds between two looks at whether one that waits for the model still wants it
EMPTY = "the answer is empty: it ended before it began; your message is taken back, so say it otherwise, or sample"


class Speaker:
    """The loaded model with the prompt that it was trained with.

    Args:
        model: the base, or a PeftModel on it.
        prompt: as of training; its max_length leaves room for an answer in the model's context.
        systems: whom the model can speak as: adapter and base, or base where no adapter is loaded.
    """

    def __init__(self, model: torch.nn.Module, prompt: Prompt, systems: Sequence[System]):
        self.model: Any = model.eval()
        self.prompt = prompt
        self.systems = tuple(systems)
        self._one_at_a_time = threading.Lock()

    @property
    def most_new_tokens(self) -> int:
        """Longest answer that fits the model's context behind any prompt."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        return int(limit) - self.prompt.max_length

    def context(self, dialogue: Dialogue) -> tuple[list[int], int]:
        """Tokens of the prompt after the last turn, and how many of the oldest turns did not fit into it.

        It is the prompt of training: what a reply here would be predicted from, had the dialogue been trained on.

        Raises:
            KestrelError: persona and last message alone are too long, or a text spells a control token.
        """
        placeholder = replace(dialogue, turns=(*dialogue.turns, Turn("self", "ok")))
        try:
            rendered = self.prompt.render(placeholder)
        except Unrenderable as error:
            if error.reason == TOO_LONG:
                raise KestrelError(
                    f"persona and message alone take more than the {self.prompt.max_length:,} tokens that a prompt may "
                    "have: prompt.max_length, or the model's context less generation.max_new_tokens; shorten them"
                ) from None
            raise KestrelError(f"{str(error).removeprefix(f'dialogue {dialogue.dialogue_id}: ')}; reword it") from None
        return rendered.input_ids[: rendered.reply_spans[-1][0]], rendered.first_turn

    def exchange(
        self,
        began: Exchange,
        context: Sequence[int],
        beside: bool,
        chosen: Generation,
        stop: threading.Event | None = None,
    ) -> Generator[Exchange, None, None]:
        """Yields an exchange as its answer grows, and then, if both are asked, the other system's over the same prompt.

        First comes the one that is given, without an answer: the model may still be busy with another one's.
        """
        yield began
        exchange = began
        for system in (began.system, *(s for s in self.systems if beside and s != began.system)):
            with contextlib.closing(self.answer(context, system, chosen, stop)) as answer:
                for text in answer:
                    if system == began.system:
                        exchange = replace(exchange, reply=text)
                    else:
                        exchange = replace(exchange, beside={system: text})
                    yield exchange

    def answer(
        self, context: Sequence[int], system: System, chosen: Generation, stop: threading.Event | None = None
    ) -> Generator[str, None, None]:
        """Yields the answer as far as it is known, each time with more text; the last one is the whole answer.

        The model works in a thread of its own, so that the one that reads can be interrupted at any moment. When the
        reading ends early, the model stops after the token it is at.

        Args:
            context: from `context`.
            system: who answers.
            chosen: sampling, lengths and stop strings. Beams are shown when they are done.
            stop: ends the answer where it is, also while another one is still to be waited for.
        """
        said: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        unread = threading.Event()

        def over() -> bool:
            return unread.is_set() or (stop is not None and stop.is_set())

        def work() -> None:
            try:
                while not over():
                    if self._one_at_a_time.acquire(timeout=_LOOK_EVERY):
                        try:
                            self._generate(context, system, chosen, said, over)
                        finally:
                            self._one_at_a_time.release()
                        break
                said.put(None)
            except BaseException as error:  # noqa: BLE001  raised again in the thread that reads
                said.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (item := said.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            unread.set()
            worker.join()

    def _generate(
        self,
        context: Sequence[int],
        system: System,
        chosen: Generation,
        said: queue.SimpleQueue[str | BaseException | None],
        over: Callable[[], bool],
    ) -> None:
        shown, start, stops = "", len(context), StopStrings(self.prompt, chosen.stop_strings)

        def look(sequences: torch.Tensor) -> list[bool]:
            """Passes on the text so far; tells of each row whether that is all."""
            nonlocal shown
            rows = [stops.text_so_far(row[start:]) for row in sequences.tolist()]
            if len(rows) == 1 and len(rows[0][0]) > len(shown):  # with several beams none is the answer yet
                shown = rows[0][0]
                said.put(shown)
            return [ended or over() for _, ended in rows]

        ids = torch.tensor([context], device=next(self.model.parameters()).device)
        as_base = system == "base" and "adapter" in self.systems
        with self.model.disable_adapter() if as_base else contextlib.nullcontext():
            config = generation_config(chosen, self.prompt)
            generated = generate(self.model, config, ids, torch.ones_like(ids), look)
        if not over():
            said.put(stops.text_so_far(generated[0, start:].tolist(), is_whole=True)[0])
