"""Answers that grow token by token, from the adapter or the base, and can be stopped at any moment."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kestrel.adapter.lora import load_adapter
from kestrel.adapter.proof import prove_loaded
from kestrel.adapter.source import CONFIG, WEIGHTS
from kestrel.chat.conversation import Conversation, Exchange, System
from kestrel.config.settings import Generation
from kestrel.dialogue import Dialogue, Turn
from kestrel.errors import KestrelError
from kestrel.generation.respond import generate, generation_config
from kestrel.generation.stop_strings import StopStrings
from kestrel.model.loss import attach_token_nll, causal_lm_of
from kestrel.prompt.prompt import TOO_LONG, Prompt, Rendered, Unrenderable
from kestrel.runtime.manifest import sha256_of, sha256_of_json

_POLL_SECONDS = 0.1  # how often an answer that waits for the model checks whether it was stopped
EMPTY_ANSWER = "the answer is empty and your message was taken back: rephrase it, or sample"


FindAdapter = Callable[[str], tuple[Path, dict[str, Any]]]


class ChatModel:
    """The loaded model with the prompt that it was trained with.

    Args:
        prompt: its max_length leaves space for an answer in the model's context.
        systems: adapter and base, or base alone where no adapter is loaded.
        title: names the base, and the run or the adapter.
        find_adapter: opens another adapter for this base by the name of model.adapter, and checks it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompt: Prompt,
        systems: Sequence[System],
        title: str = "Kestrel",
        find_adapter: FindAdapter | None = None,
    ):
        self.model: Any = model.eval()
        self.prompt, self.systems, self.title, self._find_adapter = prompt, tuple(systems), title, find_adapter
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

    def use_adapter(self, name: str) -> str:
        """Answers by another adapter from now on. Returns what was proven of it.

        Raises:
            KestrelError: no adapter is loaded, or there is none of that name that fits this base and prompt.
            ProofError: it computes something else than in its training.
        """
        if self._find_adapter is None or "adapter" not in self.systems:
            raise KestrelError("only the base is loaded; start without generation.systems base")
        folder, manifest = self._find_adapter(name)
        with self._one_at_a_time:
            # By its content: a folder may hold another adapter by now.
            label = f"adapter-{sha256_of_json([sha256_of(folder / name) for name in (CONFIG, WEIGHTS)])}"
            before, is_new = self.model.active_adapter, label not in self.model.peft_config
            try:
                if is_new:
                    load_adapter(self.model, folder, label=label)
                self._activate(label)
                dtype = str(causal_lm_of(self.model).dtype).removeprefix("torch.")
                return prove_loaded(self.model, manifest, self.prompt.identity(), dtype)
            except BaseException:  # also Ctrl-C
                self._activate(before)
                if is_new and label in self.model.peft_config:  # else the next try would take it for a whole one
                    self.model.delete_adapter(label)
                raise

    def _activate(self, label: str) -> None:
        self.model.set_adapter(label)
        self.model.requires_grad_(False)
        attach_token_nll(self.model)  # the fast layers hold the matrices of the adapter that was active

    def context(self, dialogue: Dialogue) -> tuple[list[int], int]:
        """Token ids of the prompt after the last turn, exactly as in training, and how many of the oldest turns were
        left out to make it fit.

        Raises:
            KestrelError: persona and last message alone are too long, or a text spells a control token.
        """
        rendered = self._render(replace(dialogue, turns=(*dialogue.turns, Turn("self", "ok"))))
        return rendered.input_ids[: rendered.reply_spans[-1][0]], rendered.first_turn

    def _render(self, dialogue: Dialogue) -> Rendered:
        try:
            return self.prompt.render(dialogue)
        except Unrenderable as error:
            if error.reason == TOO_LONG:
                raise KestrelError(
                    f"persona and message together exceed the {self.prompt.max_length:,} tokens of a prompt "
                    "(prompt.max_length, or the model's context less generation.max_new_tokens); shorten them"
                ) from None
            raise KestrelError(f"{str(error).removeprefix(f'dialogue {dialogue.dialogue_id}: ')}; reword it") from None

    def stream_exchange(
        self,
        exchange: Exchange,
        context: Sequence[int],
        compare: bool,
        settings: Generation,
        stop: threading.Event | None = None,
        begun: Sequence[int] = (),
    ) -> Generator[Exchange, None, None]:
        """Yields an exchange as its reply grows and then, to compare, as the other system's answer grows.

        Args:
            begun: token ids of the reply so far, which is continued.
        """
        for system in (exchange.system, *(s for s in self.systems if compare and s != exchange.system)):
            own = system == exchange.system
            with contextlib.closing(
                self.stream_answer(context, system, settings, stop, begun if own else ())
            ) as answer:
                for text, is_cut in answer:
                    grown: dict[str, Any] = {"reply": text, "is_cut": is_cut} if own else {"beside": {system: text}}
                    exchange = replace(exchange, **grown)
                    yield exchange

    def continuation(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before the last reply, and of that reply without its end.

        Raises:
            KestrelError: there is no reply, or the two are too long.
        """
        if not conversation.exchanges:
            raise KestrelError("nothing to continue: the conversation is empty")
        rendered = self._render(conversation.dialogue())
        start, end = rendered.reply_spans[-1]
        return rendered.input_ids[:start], rendered.input_ids[start : end - 1]

    def tokens_of(self, conversation: Conversation) -> tuple[int, int]:
        """Tokens of the prompt of the last reply, and of that reply."""
        return tuple(len(ids) for ids in self.continuation(conversation))  # type: ignore[return-value]

    def stream_answer(
        self,
        context: Sequence[int],
        system: System,
        settings: Generation,
        stop: threading.Event | None = None,
        begun: Sequence[int] = (),
    ) -> Generator[tuple[str, bool], None, None]:
        """Yields the answer so far, each time with more text, and whether max_new_tokens cut it; the last one is the whole.

        The model works in a thread of its own, so that the reader can be interrupted at any moment. When the reader
        closes the generator, the model stops after the current token. Of several beams, only the final answer is shown.

        Args:
            context: token ids from `context`.
            stop: set to end the answer, also while it still waits for another one to end.
            begun: token ids of an answer that is continued; the text has it too.
        """
        texts: queue.SimpleQueue[tuple[str, bool] | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()

        def stopped() -> bool:
            return closed.is_set() or (stop is not None and stop.is_set())

        def work() -> None:
            try:
                while not stopped():
                    if self._one_at_a_time.acquire(timeout=_POLL_SECONDS):
                        try:
                            self._generate(context, begun, system, settings, texts.put, stopped)
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
        begun: Sequence[int],
        system: System,
        settings: Generation,
        show: Callable[[tuple[str, bool]], None],
        stopped: Callable[[], bool],
    ) -> None:
        shown, start, stops = "", len(context), StopStrings(self.prompt, settings.stop_strings)

        def answered(ids: list[int]) -> list[int]:
            """Without the end token, which the tokenizer need not count as special, and what comes after it."""
            return ids[: next((place for place, token in enumerate(ids) if token in self.prompt.end_ids), None)]

        def rows_ended(sequences: torch.Tensor) -> list[bool]:
            """Shows the text so far."""
            nonlocal shown
            rows = [stops.text_so_far(answered(row[start:])) for row in sequences.tolist()]
            if len(rows) == 1 and len(rows[0][0]) > len(shown):  # with several beams, none is the answer yet
                shown = rows[0][0]
                show((shown, False))
            return [ended or stopped() for _, ended in rows]

        ids = torch.tensor([[*context, *begun]], device=next(self.model.parameters()).device)
        config = generation_config(settings, self.prompt)
        without_adapter = system == "base" and "adapter" in self.systems
        with self.model.disable_adapter() if without_adapter else contextlib.nullcontext():
            generated = generate(self.model, config, ids, torch.ones_like(ids), rows_ended)
        if not stopped():
            text, ended = stops.text_so_far(answered(generated[0, start:].tolist()), is_whole=True)
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            ended |= generated[0, -1].item() in ends or generated.shape[1] < ids.shape[1] + settings.max_new_tokens
            show((text, not ended))
