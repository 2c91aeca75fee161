"""The events of the page without a browser."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr
import httpx
import pytest
import torch
from make_models import make_tokenizer

from kestrel.chat.conversation import Conversation, Exchange
from kestrel.chat.page_events import Events, Session
from kestrel.chat.server import build_application
from kestrel.chat.streaming import ChatModel
from kestrel.config.settings import Generation
from kestrel.data.persona_file import Persona
from kestrel.prompt.prompt import Prompt

CONTROLS: tuple[Any, ...] = (False, 1, 1, 0, 8, 1, 0, 1)


class Scripted(ChatModel):
    """Answers "ok", or fails as when the memory of a GPU is used up."""

    fails, most_new_tokens = False, 256

    def stream_exchange(self, exchange, *rest, **more):
        if self.fails:
            raise RuntimeError("out of memory")
        yield Exchange(exchange.message, exchange.system, "ok")


def opened(*exchanges: Exchange, persona: tuple[str, ...] = ("i am here .",)) -> tuple[Events, Session]:
    """A page whose model has the adapter alone."""
    conversation = Conversation(Persona(persona), list(exchanges))
    model = Scripted(torch.nn.Identity(), Prompt(make_tokenizer(), "plain", 256), ["adapter"])
    return Events(model, conversation, Generation()), Session(conversation)


def test_failing_model_leaves_the_page_usable():
    events, session = opened()
    events.model.fails = True
    shown = []
    with pytest.raises(gr.Error, match="failed to answer: out of memory"):
        for outputs in events.send("hi !", session, "i am here .", "adapter", False, *CONTROLS):
            shown.append([getattr(output, "value", output) for output in outputs])
    assert shown[0][0] == "" and len(shown[0][2]) == 2 and shown[-1] == ["hi !", "", []]
    assert session.stop is None and not session.conversation.exchanges


def test_a_refused_event_loses_no_turn():
    long, null = "dog " * 3000, (*CONTROLS[:-1], None)  # a control that was emptied
    said = [Exchange(text, "adapter", "ok") for text in ("hi !", "and ?", long)]  # as a loaded conversation may hold
    events, session = opened(*said)
    for refused in (
        events.edit(1, long, session, "adapter", False, *CONTROLS),
        events.edit(1, "hi !", session, "adapter", False, *null),
        events.retry(session, "adapter", False, *CONTROLS),
    ):
        with pytest.raises(gr.Error):
            list(refused)
        assert session.conversation.exchanges == said
    events, session = opened(*said[:2])
    for refused in (events.retry(session, "adapter", False, *null), events.go_on(session, *null)):
        with pytest.raises(gr.Error):
            list(refused)
        assert session.conversation.exchanges == said[:2]


@pytest.mark.parametrize("sentences", [(), ("i am\nhere .", "and  there .")])
def test_a_persona_is_changed_by_new_words_alone(sentences):
    """A data set may have no personas, and one of its sentences may hold a line break or double blanks."""
    events, session = opened(Exchange("hi !", "adapter", "ok"), persona=sentences)
    loaded, text = session.conversation, "\n".join(sentences)
    list(events.send("and ?", session, text, "adapter", False, *CONTROLS))
    assert session.conversation is loaded and len(loaded.exchanges) == 2
    events.reset(session, text)
    assert session.conversation.persona is loaded.persona and not session.conversation.exchanges
    list(events.send("and ?", session, f"{text}\ni  am new .", "adapter", False, *CONTROLS))
    assert session.conversation.persona.sentences[-1] == "i am new ."


def test_a_loaded_answer_of_a_system_that_is_not_here_is_shown():
    events, session = opened(Exchange("hi !", "base", "ok", {}), Exchange("and ?", "adapter", "no", {"base": "yes"}))
    messages, is_visible = events.column(session, "adapter")
    assert is_visible and [each["content"]["text"] for each in messages] == ["hi !", "ok", "and ?", "no"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_host_of_this_machine_alone_serves_its_own_name_and_no_other(host):
    async def status(url: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application)) as client:
            return (await client.get(url)).status_code

    events, session = opened()
    application = build_application(events.model, session.conversation, Generation(), host, None)
    assert asyncio.run(status(f"http://{f'[{host}]' if ':' in host else host}:8000/")) == 200
    assert asyncio.run(status("http://elsewhere.example:8000/")) == 400


def test_an_adapter_is_named_as_people_type_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    events, _ = opened()
    asked = []
    events.model.use_adapter = lambda name: asked.append(name) or "proven"
    events.use_adapter(" ~/run/adapter ")
    assert asked == ["/home/me/run/adapter"]
