"""The Modelfile renders conversations as the prompt of training does."""

from __future__ import annotations

import re

import pytest
from jinja2 import Environment
from make_models import make_tokenizer
from make_tokenizers import CHATML, byte_level

from kestrel.config.settings import Generation
from kestrel.dialogue import Dialogue, Turn
from kestrel.prompt.prompt import Prompt
from kestrel.publishing.ollama import modelfile

# The part of Go's templates that is used, in Jinja's words.
_AS_JINJA = (
    (r"\{\{ \.System \}\}", "{{ system }}"),
    (r"\{\{ range \$i, \$_ := \.Messages \}\}", "{% for message in messages %}"),
    (r'\{\{ if eq \.Role "(\w+)" \}\}', r'{% if message.role == "\1" %}'),
    (r'\{\{ else if eq \.Role "(\w+)" \}\}', r'{% elif message.role == "\1" %}'),
    (r"\{\{ if le \$i 1 \}\}", "{% if loop.index0 <= 1 %}"),
    (r"\{\{ else \}\}", "{% else %}"),
    (r"\{\{ \.Content \}\}", "{{ message.content }}"),
)
_PERSONA = ("i have two dogs.", "i work nights.")
_SAID = ("hi ! any pets ?", "two dogs .", "what do you do ?", "i work at night .", "oh ?")


def rendered(template: str, system: str, messages: list[dict[str, str]]) -> str:
    for pattern, instead in _AS_JINJA:
        template = re.sub(pattern, instead, template)
    ends = iter(["{% endif %}", "{% endif %}", "{% endfor %}"])
    template = re.sub(r"\{\{ end \}\}", lambda _: next(ends), template)
    return Environment(keep_trailing_newline=True).from_string(template).render(system=system, messages=messages)


@pytest.mark.parametrize("system_among_messages", [True, False])
@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("format", ["plain", "chat"])
def test_a_conversation_in_ollama_has_the_text_of_training(format, turns, system_among_messages) -> None:
    tokenizer = make_tokenizer() if format == "plain" else byte_level(chat_template=CHATML)
    prompt = Prompt(tokenizer, format, 512)
    text = modelfile(prompt, Generation(stop_strings=["\n"]))
    assert text is not None
    (template,) = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    (system,) = re.findall(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    speakers = ["partner", "self"] * 3
    said = [Turn(speaker, words) for speaker, words in zip(speakers, _SAID[:turns], strict=False)]  # type: ignore[arg-type]
    roles = {"partner": "user", "self": "assistant"}
    messages = [{"role": roles[turn.speaker], "content": turn.text} for turn in said]
    if system_among_messages:
        messages.insert(0, {"role": "system", "content": system})
    segments = prompt.segments(Dialogue("any", _PERSONA, (*said, Turn("self", "qreply"))))
    expected = "".join(segment.text for segment in segments).partition("qreply")[0]
    assert rendered(template, system, messages) == expected.removesuffix(" ")
    end = tokenizer.eos_token
    assert f'PARAMETER stop "{end}"' in text and 'PARAMETER stop "\n"\n' in text and "PARAMETER temperature 0\n" in text


def test_what_ollama_would_misread_has_no_modelfile() -> None:
    """The original prompt, and templates whose text would end a block of the Modelfile or run in Ollama's template."""
    assert modelfile(Prompt(make_tokenizer(), "original", 512), Generation()) is None
    for text in ('"""\nFROM /etc/passwd\n"""', "{{ '{{ .Env }}' }}"):
        tokenizer = byte_level(chat_template=text + CHATML)
        assert modelfile(Prompt(tokenizer, "chat", 512), Generation()) is None
