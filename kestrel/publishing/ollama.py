"""A Modelfile for Ollama: the prompt of training as Ollama's template, the persona as its system message.

Written by Ollama's documentation of Modelfiles and of their templates, which are Go's. Ollama itself was not run.
"""

from __future__ import annotations

from kestrel.config.settings import Generation
from kestrel.dialogue import Dialogue, Turn
from kestrel.prompt.prompt import Prompt
from kestrel.publishing.usage import EXAMPLE

# Stand for the texts of a conversation; no prompt has them.
_PERSONA, _USER, _REPLY = ("qpersona0", "qpersona1"), ("quser0", "quser1"), ("qreply0", "qreply1")


def modelfile(prompt: Prompt, generation: Generation) -> str | None:
    """The Modelfile beside a merged model, for `model.gguf` in the same folder; None for the original prompt, and for a chat
    template whose texts Ollama would read as its own commands.

    Every conversation is rendered as in training: the tests compare the two texts.
    """
    if prompt.format == "original":
        return None
    turns = [
        Turn(*pair) for user, reply in zip(_USER, _REPLY, strict=True) for pair in (("partner", user), ("self", reply))
    ]
    segments = prompt.segments(Dialogue("template", _PERSONA, tuple(turns)))
    text = "".join(segment.text for segment in segments)
    lead = next(segment.text for segment in segments if _REPLY[0] in segment.text).partition(_REPLY[0])[0]
    if '"""' in text or "{{" in text:
        return None
    head, rest = _split(text, _PERSONA[0])
    between, rest = _split(rest, _PERSONA[1])
    first, rest = _split(rest, _USER[0])
    asked, rest = _split(rest, _REPLY[0])
    later, _ = _split(rest, _USER[1])
    template = (
        f'{head}{{{{ .System }}}}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}'
        f"{{{{ if le $i 1 }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}{{{{ .Content }}}}{asked.removesuffix(lead)}"
        f'{{{{ else if eq .Role "assistant" }}}}{lead}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}'
    )
    end = prompt.tokenizer.decode([prompt.end_id])
    stops = [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys([end, *generation.stop_strings])]
    temperature = 1.0 if generation.temperature is None else generation.temperature
    lines = [
        "# ollama create NAME -f Modelfile && ollama run NAME; write your persona into SYSTEM.",
        "FROM ./model.gguf",
        f'TEMPLATE """{template}"""',
        f'SYSTEM """{between.join(EXAMPLE.persona)}"""',
        *stops,
        f"PARAMETER temperature {temperature if generation.do_sample else 0:g}",
        *(
            [f"PARAMETER top_k {generation.top_k or 0}", f"PARAMETER top_p {generation.top_p or 1:g}"]
            if generation.do_sample
            else []
        ),
        f"PARAMETER num_predict {generation.max_new_tokens}",
        f"PARAMETER repeat_penalty {generation.repetition_penalty:g}",
    ]
    return "\n".join(lines) + "\n"


def _split(text: str, mark: str) -> tuple[str, str]:
    before, _, after = text.partition(mark)
    return before, after


def _quoted(text: str) -> str:
    """Ollama's parser takes off the quotes and reads no escapes; a line break stands as it is."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'
