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
from typing import TYPE_CHECKING, Any

from kestrel.errors import KestrelError, UsageError
from kestrel.runtime.command_line import run_script
from kestrel.runtime.signals import on_signals, raise_interrupted

if TYPE_CHECKING:
    from kestrel.chat.streaming import ChatModel
    from kestrel.config.settings import Settings
    from kestrel.prompt.prompt import Prompt

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--persona", {"nargs": "+", "metavar": "FILE", "help": "a text file, one sentence a line, or the sentences"}),
    ("--dialogue", {"metavar": "ID", "help": "take the persona of this dialogue (default: the split's first)"}),
    ("--web", {"action": "store_true", "help": "talk in a browser"}),
    ("--host", {"metavar": "ADDRESS", "help": "with --web: listen here (default: 127.0.0.1, this machine only)"}),
    ("--port", {"type": int, "metavar": "N", "help": "with --web: listen at this port (default: 7860)"}),
]


def chat(settings: Settings, options: argparse.Namespace) -> None:
    check(options)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 must not end a conversation
        sys.stdin.reconfigure(errors="replace")

    from kestrel.chat.persona import persona_from_option, persona_of_dialogue

    persona = persona_from_option(options.persona) if options.persona else None

    import torch

    from kestrel.chat.terminal import Terminal
    from kestrel.model.base import load_config
    from kestrel.prompt.prompt import Prompt
    from kestrel.prompt.tokenizer import load_tokenizer

    # Old turns are left out of a long conversation, so that prompt and answer always fit the model's context.
    context = getattr(load_config(settings.model), "max_position_embeddings", None) or sys.maxsize
    longest = min(settings.prompt.max_length, context - settings.generation.max_new_tokens)
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, longest)
    persona = persona or persona_of_dialogue(settings, prompt, options.dialogue, options.again)
    model = load(settings, options, prompt)
    torch.manual_seed(settings.seed)
    with on_signals(raise_interrupted):
        if options.web:
            from kestrel.chat.server import serve

            port = 7860 if options.port is None else options.port
            serve(model, persona, settings.generation, options.host or "127.0.0.1", port)
        else:
            Terminal(model, persona, settings.generation).run()


def check(options: argparse.Namespace) -> None:
    """Refuses options that contradict each other, before anything is loaded."""
    problems = []
    if options.persona and options.dialogue is not None:
        problems.append("--dialogue: --persona already gives the persona; leave one out")
    if not options.web:
        problems += [f"--{name}: needs --web" for name in ("host", "port") if getattr(options, name) is not None]
    if options.port is not None and not 0 <= options.port < 2**16:
        problems.append(f"--port: expected 0 (any free port) to 65535, found {options.port}")
    if problems:
        raise UsageError(problems)
    if options.web and find_spec("gradio") is None:
        raise KestrelError(f"--web needs Gradio: {sys.executable} -m pip install -r requirements-web.txt")


def load(settings: Settings, options: argparse.Namespace, prompt: Prompt) -> ChatModel:
    """The base and, unless generation.systems is base alone, the adapter, proven to be the trained one."""
    from kestrel.adapter.compute_dtype import with_compute_dtype
    from kestrel.adapter.load import load_model
    from kestrel.adapter.open import open_adapter
    from kestrel.chat.streaming import ChatModel
    from kestrel.model.base import base_identity, load_config

    settings = with_compute_dtype(settings)
    if "adapter" not in settings.generation.systems:
        return ChatModel(load_model(settings, prompt, None), prompt, ["base"])
    base = base_identity(settings.model, load_config(settings.model))
    try:
        adapter = open_adapter(settings, prompt, base, f"python train.py {options.again}")
    except KestrelError as error:
        raise KestrelError(f"{error}\n  or talk with the base alone: --generation.systems base") from None
    model = load_model(settings, prompt, adapter)
    print()
    return ChatModel(model, prompt, ["adapter", "base"])


def main(argv: list[str] | None = None) -> int:
    return run_script("chat.py", __doc__, chat, argv, OPTIONS, writes=False)


if __name__ == "__main__":
    sys.exit(main())
