"""Talks with the adapter, or with the base, as the owner of a persona.

    python chat.py --config configs/falcon-7b.yaml
    python chat.py --config configs/falcon-7b.yaml --persona "i have two dogs." "i work nights."
    python chat.py --config configs/falcon-7b.yaml --web

The persona is that of a dialogue of generation.split, or is given. The prompt is that of training, and generation.*
says how answers are made; with generation.systems base, no adapter is needed. Nothing is written but by /save. --web
opens the same in a browser and needs requirements-web.txt.
"""

from __future__ import annotations

import argparse
import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kestrel.config.settings import Settings
from kestrel.errors import KestrelError, UsageError
from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.chat.streaming import Speaker
    from kestrel.prompt.prompt import Prompt

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (
        "--persona",
        {"nargs": "+", "metavar": "FILE", "help": "a text file with one sentence a line, or the sentences themselves"},
    ),
    ("--dialogue", {"metavar": "ID", "help": "be the person of this dialogue (default: the split's first)"}),
    ("--web", {"action": "store_true", "help": "talk in a browser"}),
    ("--host", {"metavar": "ADDRESS", "help": "with --web: listen here (default: 127.0.0.1, this machine alone)"}),
    ("--port", {"type": int, "metavar": "N", "help": "with --web: listen at this port (default: 7860)"}),
]


def chat(settings: Settings, options: argparse.Namespace) -> None:
    check(options)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 must not end a conversation
        sys.stdin.reconfigure(errors="replace")
    given = given_persona(options.persona) if options.persona else None

    import torch

    from kestrel.chat.conversation import Conversation
    from kestrel.chat.terminal import Terminal
    from kestrel.model.base import load_config
    from kestrel.prompt.prompt import Prompt
    from kestrel.prompt.tokenizer import load_tokenizer

    # A long conversation loses its oldest turns in time, so that prompt and answer always fit the model's context.
    context = getattr(load_config(settings.model), "max_position_embeddings", None) or sys.maxsize
    longest = min(settings.prompt.max_length, context - settings.generation.max_new_tokens)
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, longest)
    persona = given if given is not None else persona_of_dialogue(settings, options, prompt)
    speaker = load(settings, options, prompt)
    torch.manual_seed(settings.seed)
    if options.web:
        from kestrel.chat.server import serve

        port = 7860 if options.port is None else options.port
        serve(speaker, persona, settings.generation, options.host or "127.0.0.1", port)
    else:
        # Where there is an adapter, it is the first of them.
        Terminal(speaker, Conversation(persona), speaker.systems[0], settings.generation).run()


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot be meant, before anything is loaded."""
    problems = []
    if options.persona and options.dialogue is not None:
        problems.append("--dialogue: names a persona, and --persona another; leave one out")
    if not options.web:
        problems += [f"--{name}: belongs to --web" for name in ("host", "port") if getattr(options, name) is not None]
    if options.port is not None and not 0 <= options.port < 2**16:
        problems.append(f"--port: a port is 0 (any that is free) to 65535, found {options.port}")
    if problems:
        raise UsageError(problems)
    if options.web and find_spec("gradio") is None:
        raise KestrelError(
            f"--web needs Gradio, which is not installed: {sys.executable} -m pip install -r requirements-web.txt"
        )


def given_persona(given: list[str]) -> tuple[str, ...]:
    """The sentences of --persona, or of the file it names."""
    from kestrel.chat.conversation import read_persona, sentences

    one_word = len(given) == 1 and len(given[0].split()) == 1
    return read_persona(Path(given[0])) if one_word or Path(given[0]).is_file() else sentences(given, "--persona")


def persona_of_dialogue(settings: Settings, options: argparse.Namespace, prompt: Prompt) -> tuple[str, ...]:
    """The persona of --dialogue, or of the split's first dialogue."""
    from kestrel.data.dataset import load_split, open_dataset

    remedy = f"python preprocess.py {options.again}"
    split = settings.generation.split
    try:
        folder, _ = open_dataset(settings, prompt, remedy)
        rows = load_split(folder, split, remedy)
    except KestrelError as error:
        raise KestrelError(f"{error}\n  or give a persona: --persona FILE") from None
    ids = list(rows["dialogue_id"])
    if options.dialogue is not None and options.dialogue not in ids:
        raise KestrelError(f"--dialogue: {split} has no {options.dialogue!r}; its ids are {', '.join(ids[:3])} …")
    return tuple(rows[ids.index(options.dialogue) if options.dialogue is not None else 0]["persona"])


def load(settings: Settings, options: argparse.Namespace, prompt: Prompt) -> Speaker:
    """The base and, if it is to talk, the adapter, proven to be the ones that were trained with this prompt."""
    from kestrel.adapter.load import load_model
    from kestrel.adapter.open import open_adapter
    from kestrel.chat.streaming import Speaker
    from kestrel.model.base import base_identity, load_config

    if "adapter" not in settings.generation.systems:
        return Speaker(load_model(settings, prompt, None), prompt, ["base"])
    base = base_identity(settings.model, load_config(settings.model))
    try:
        adapter = open_adapter(settings, prompt, base, f"python train.py {options.again}")
    except KestrelError as error:
        raise KestrelError(f"{error}\n  or talk with the base alone: --generation.systems base") from None
    model = load_model(settings, prompt, adapter)
    print()
    return Speaker(model, prompt, ["adapter", "base"])


def main(argv: list[str] | None = None) -> int:
    return run_script("chat.py", __doc__, chat, argv, OPTIONS, writes=False)


if __name__ == "__main__":
    sys.exit(main())
