"""Talks with the adapter, or with the base, as the owner of a persona.

    python chat.py --config configs/falcon-7b.yaml
    python chat.py --config configs/falcon-7b.yaml --persona "i have two dogs." "i work nights."
    python chat.py --config configs/falcon-7b.yaml --web

Without --persona, the persona is that of a dialogue in generation.split. The prompt is the one of training, and the
generation.* settings control the answers; generation.systems base needs no adapter. Only /save writes a file. --web
opens the same in a browser and needs requirements-web.txt.
"""

from __future__ import annotations

import kestrel.interrupts  # noqa: F401  before all others: from here on Ctrl-C is quiet

import argparse
import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError, UsageError
from kestrel.runtime.command_line import run_script
from kestrel.runtime.signals import on_signals, raise_interrupted

if TYPE_CHECKING:
    from kestrel.config.settings import Settings
    from kestrel.data.persona_file import Persona

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (
        "--persona",
        {
            "nargs": "+",
            "metavar": "FILE",
            "help": "a text file with a sentence a line, a character card, a saved name, or the sentences",
        },
    ),
    ("--load", {"metavar": "FILE", "help": "go on with the last conversation that /save wrote to this file"}),
    ("--dialogue", {"metavar": "ID", "help": "take the persona of this dialogue (default: the split's first)"}),
    ("--web", {"action": "store_true", "help": "talk in a browser"}),
    ("--host", {"metavar": "ADDRESS", "help": "with --web: listen here (default: 127.0.0.1, this machine only)"}),
    ("--port", {"type": int, "metavar": "N", "help": "with --web: listen at this port (default: 7860)"}),
]


def chat(settings: Settings, options: argparse.Namespace) -> None:
    check(options)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 must not end a conversation
        sys.stdin.reconfigure(errors="replace")

    from kestrel.chat.conversation import Conversation
    from kestrel.chat.conversation import load as load_conversation
    from kestrel.chat.load import load_chat_model
    from kestrel.chat.persona import persona_from_option, persona_of_dialogue
    from kestrel.chat.sampling import chat_settings

    persona = persona_from_option(options.persona) if options.persona else None
    conversation = load_conversation(Path(options.load)) if options.load else None

    import torch

    from kestrel.chat.terminal import Terminal
    from kestrel.model.base import open_base
    from kestrel.prompt.load import load_prompt

    prompt = load_prompt(settings)
    settings, config = open_base(settings, prompt)
    # Old turns are left out of a long conversation, so that prompt and answer always fit the model's context.
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    prompt.max_length = min(settings.prompt.max_length, context - settings.generation.max_new_tokens)
    if conversation is None:
        conversation = Conversation(persona or persona_of_dialogue(settings, prompt, options.again, options.dialogue))
    model = load_chat_model(settings, prompt, options.again)
    chosen = chat_settings(settings.generation, vars(options))
    torch.manual_seed(settings.seed)
    with on_signals(raise_interrupted):
        if options.web:
            from kestrel.chat.server import serve

            port = 7860 if options.port is None else options.port
            serve(model, conversation, chosen, options.host or "127.0.0.1", port)
        else:

            def find_persona(dialogue: str | None) -> Persona:
                return persona_of_dialogue(settings, prompt, options.again, dialogue, draw=True)

            print(f"{model.title}\n")
            Terminal(model, conversation, chosen, find_persona).run()


def check(options: argparse.Namespace) -> None:
    """Refuses options that contradict each other, before anything is loaded."""
    problems = []
    given = [f"--{name}" for name in ("persona", "dialogue", "load") if getattr(options, name) is not None]
    if len(given) > 1:
        problems.append(f"{given[1]}: {given[0]} already gives the persona; leave one out")
    if not options.web:
        problems += [f"--{name}: needs --web" for name in ("host", "port") if getattr(options, name) is not None]
    if options.port is not None and not 0 <= options.port < 2**16:
        problems.append(f"--port: expected 0 (any free port) to 65535, found {options.port}")
    if problems:
        raise UsageError(problems)
    if options.web and find_spec("gradio") is None:
        raise KestrelError(f"--web needs Gradio: {sys.executable} -m pip install -r requirements-web.txt")


def main(argv: list[str] | None = None) -> int:
    return run_script("chat.py", __doc__, chat, argv, OPTIONS, writes=False)


if __name__ == "__main__":
    sys.exit(main())
