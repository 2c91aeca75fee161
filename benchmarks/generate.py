"""How long generate.py's work takes for as many replies as ConvAI2's validation set has, beside transformers' generate.

    python benchmarks/falcon_7b_shape.py --output /tmp/falcon
    python benchmarks/generate.py --model /tmp/falcon --output benchmarks/results/generate-gpu.json [--text FILE]
    python benchmarks/generate.py --shape qwen2.5-7b --output FILE [--model FOLDER] [--text FILE]

A base of random weights in NF4 with an adapter answers the replies of a text, its dialogues repeated until there are
enough. Such weights end no reply, so that every answer has all its tokens. Before anything is timed, each token that
Kestrel says must be the likeliest one in a plain pass of transformers' own model over that one context, and each
reference as likely, up to rounding.

    kestrel     as generate.py does it, once for each of --tokens_per_step, which may be auto: prompts rendered, answers,
                likelihoods of all references, file written
    stock       transformers' generate with its own attention: left-padded batches of similar length, answers alone. Some
                batches are timed, spread over the lengths, and the seconds of all extrapolated

The floor is what the matrix products alone would take at the rate of the same run: 2 FLOPs for each linear parameter and
each token of the dialogues and of the answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks import machine
from benchmarks.options import at_least_one, command_of, parser_of, told
from benchmarks.profiles import PROFILES, read_dialogues, write_model
from benchmarks.shape_profiles import CONFIG, profile_of
from benchmarks.shapes import SHAPES
from kestrel.adapter.lora import add_lora
from kestrel.config.resolve import resolve
from kestrel.config.settings import Generation, Settings
from kestrel.dialogue import Dialogue
from kestrel.errors import ProofError
from kestrel.generation import answers
from kestrel.generation.answers import Question, questions_of, write_answers
from kestrel.generation.decoding import decode
from kestrel.generation.files import GenerationsFile
from kestrel.generation.prefix_cache import compute_prefixes
from kestrel.generation.respond import Request, respond_from_prefixes, respond_with_library
from kestrel.model.base import load_base, load_config, skeleton_of
from kestrel.model.dense_weights import dense_weights
from kestrel.model.kernels.attention import stock_attention
from kestrel.model.likelihood import SpanRequest
from kestrel.model.loss import attach_token_nll
from kestrel.model.quantization import linear_layers
from kestrel.prompt.load import load_prompt
from kestrel.prompt.prompt import Prompt, Rendered
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import git_commit, library_versions

_FALCON = "configs/falcon-7b.yaml"
_CHECKED = 8  # replies
# How far a chosen token's logit may lie below the best one, in standard deviations over the vocabulary, and how far a
# likelihood from the plain one, relatively. A token of another context lies several deviations below.
_TOLERANCE = {"float32": (1e-3, 1e-4), "bfloat16": (0.25, 2e-2)}
_NEVER_SAID = "\N{NULL}"  # the answers are looked through for a stop string, as always, but none ends at it


def rows_of(dialogues: list[Dialogue], prompt: Prompt, replies: int) -> list[dict[str, Any]]:
    """Rows as in a dataset, with so many replies exactly."""
    rows: list[dict[str, Any]] = []
    for copy in count():
        for dialogue in dialogues:
            turns = [turn for turn, _ in dialogue.replies()][:replies]
            if not turns:
                return rows
            name = f"{copy}-{dialogue.dialogue_id}"
            cut = replace(dialogue, dialogue_id=name, turns=dialogue.turns[: turns[-1] + 1], candidates=())
            rendered = prompt.render(cut)
            rows.append(row_of(cut, rendered))
            replies -= len(turns)
    raise AssertionError


def row_of(dialogue: Dialogue, rendered: Rendered) -> dict[str, Any]:
    return {
        "dialogue_id": dialogue.dialogue_id,
        "persona": list(dialogue.persona),
        "partner_persona": list(dialogue.partner_persona),
        "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in dialogue.turns],
        "candidates": [],
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
        "reply_spans": rendered.reply_spans,
    }


@torch.no_grad()
def check(model: Any, prompt: Prompt, asked: list[Question], settings: Generation, dtype: str) -> dict[str, float]:
    """Holds answers and likelihoods of some replies against plain passes of transformers' own model.

    Raises:
        ProofError: they differ by more than rounding.
    """
    contexts = [question.context for question in asked]
    whole = [
        SpanRequest([*q.context, *q.reference], [(len(q.context), len(q.context) + len(q.reference))]) for q in asked
    ]
    worst, apart = 0.0, 0.0
    for prefixes, scores in compute_prefixes(model, whole, settings.tokens_per_step):
        chosen = [index for index in range(len(asked)) if prefixes.holds(index)]
        rows = prefixes.copy_rows([(index, len(contexts[index]) - 1) for index in chosen], settings.max_new_tokens)
        with dense_weights(model):
            said = decode(model, rows, [contexts[index] for index in chosen], settings, prompt.end_ids)
        for index, answer in zip(chosen, said, strict=True):
            end = next((place for place, token in enumerate(answer) if token in prompt.end_ids), len(answer))
            answer = answer[: end + 1]
            logits = plain_logits(model, contexts[index], answer)
            below = logits.max(-1).values - logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
            worst = max(worst, (below / logits.std(-1)).max().item())
            reference = torch.tensor(asked[index].reference, device=logits.device)
            logits = plain_logits(model, contexts[index], asked[index].reference)
            plain = torch.nn.functional.cross_entropy(logits, reference, reduction="sum").item()
            apart = max(apart, abs(scores[index][0][0] - plain) / plain)
    if not (worst <= _TOLERANCE[dtype][0] and apart <= _TOLERANCE[dtype][1]):
        raise ProofError(
            f"Kestrel does not say what transformers' own model would: a token lies {worst:.3f} standard deviations "
            f"below the likeliest, a likelihood is {apart:.2%} off"
        )
    return {"deviations_below_the_likeliest": worst, "likelihood_difference": apart}


def plain_logits(model: Any, context: list[int], reply: list[int]) -> torch.Tensor:
    """float32 (reply, vocabulary): what predicts each token, from one pass without cache, padding or our attention."""
    ids = torch.tensor([[*context, *reply]], device=next(model.parameters()).device)
    with stock_attention():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].float()
    return logits


def watched(function: Callable[..., Iterator[Any]], spent: dict[str, float], name: str) -> Callable[..., Iterator[Any]]:
    """The same generator, which adds the seconds it works to `spent`."""

    def watching(*given: Any) -> Iterator[Any]:
        working = function(*given)
        while True:
            machine.synchronize()
            began = time.perf_counter()
            item = next(working, None)
            machine.synchronize()
            spent[name] += time.perf_counter() - began
            if item is None:
                return
            yield item

    return watching


def time_kestrel(model: Any, prompt: Prompt, rows: list[dict[str, Any]], settings: Generation) -> dict[str, Any]:
    """Answers all rows into a file."""
    from datasets import Dataset

    spent = {"prefill_seconds": 0.0, "decode_seconds": 0.0}
    prefill = watched(compute_prefixes, spent, "prefill_seconds")
    decoding = watched(respond_from_prefixes, spent, "decode_seconds")
    machine.reset_peak_memory()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(answers, "compute_prefixes", prefill),
        mock.patch.object(answers, "respond_from_prefixes", decoding),
    ):
        path = Path(folder) / "test.adapter.jsonl"
        began = time.perf_counter()
        shards = list(
            write_answers(model, prompt, Dataset.from_list(rows), settings, 0, GenerationsFile(path, "base", 0, {}))
        )
        seconds = time.perf_counter() - began
        replies = len(path.read_text(encoding="utf-8").splitlines())
    return {"seconds": seconds, "replies": replies, "shards": len(shards) - 1, **spent}


def time_stock(
    model: Any, prompt: Prompt, contexts: list[list[int]], settings: Generation, size: int, batches: int
) -> dict[str, Any]:
    """Some batches of all contexts in the order of their lengths."""
    contexts = sorted(contexts, key=len)
    size = min(size, len(contexts))
    firsts = np.linspace(0, len(contexts) - size, batches + 2)[1:-1] if batches * size < len(contexts) else [0]
    settings = settings.model_copy(update={"stop_strings": [], "tokens_per_step": 2**40})
    machine.reset_peak_memory()
    with stock_attention():
        machine.synchronize()
        began = time.perf_counter()
        for first in firsts:
            batch = [Request(context, 0) for context in contexts[int(first) : int(first) + size]]
            list(respond_with_library(model, prompt, batch, settings))
        machine.synchronize()
    timed = time.perf_counter() - began
    replies = size * len(firsts)
    return {"seconds": timed * len(contexts) / replies, "batch_size": size, "timed": timed, "timed_replies": replies}


def settings_of(options: argparse.Namespace, folder: Path, dialogues: list[Dialogue]) -> Settings:
    """The settings for the model in a folder, which is written where there is none."""
    if not (folder / "config.json").exists():
        write_model(folder, profile_of(options.profile, options.shape), dialogues, options.layers)
    given = {"model.name": str(folder), "quantization.compute_dtype": machine.compute_dtype()}
    settings, _ = resolve(str(options.config or ROOT / (CONFIG if options.shape else _FALCON)), given)
    return settings


def benchmark(options: argparse.Namespace, work: Path, command: str) -> None:
    dialogues, dtype = read_dialogues(options.text), machine.compute_dtype()
    settings = settings_of(options, options.model or work / "model", dialogues)
    prompt = load_prompt(settings)
    rows = rows_of(dialogues, prompt, options.replies)
    rate = machine.matrix_rate(machine.matrix_size(), dtype)

    base, _ = load_base(settings)
    skeleton = skeleton_of(load_config(settings.model))
    linear = sum(inputs * outputs for inputs, outputs in linear_layers(skeleton).values())
    model: Any = add_lora(base, settings.lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # a fresh adapter changes nothing, and an error would not show
    attach_token_nll(model)
    model.eval()
    more = {"max_new_tokens": options.new_tokens, "stop_strings": [_NEVER_SAID]}
    chosen = settings.generation.model_copy(update=more)
    asked = [question for questions in questions_of(rows, prompt) for question in questions]
    spread = [asked[index] for index in np.linspace(0, len(asked) - 1, _CHECKED).astype(int)]
    agreement = check(model, prompt, spread, chosen, dtype)

    tokens = sum(len(row["input_ids"]) for row in rows) + len(asked) * options.new_tokens
    record: dict[str, Any] = {
        "command": command,
        "shape": options.shape,
        "device": machine.device_name(),
        "compute_dtype": dtype,
        "matrix_flops": rate,
        "floor_seconds": 2 * linear * tokens / rate,
        "replies": len(asked),
        "dialogues": len(rows),
        "new_tokens": options.new_tokens,
        "prompt_tokens": sum(len(question.context) for question in asked),
        "dialogue_tokens": sum(len(row["input_ids"]) for row in rows),
        "versions": library_versions(),
        "commit": git_commit(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        **agreement,
        "rows": [],
    }
    print(", ".join(f"{key} {value}" for key, value in record.items() if key not in ("rows", "command")), flush=True)

    def add(name: str, result: dict[str, Any]) -> None:
        result |= {"replies_per_second": len(asked) / result["seconds"], "peak_bytes": machine.peak_memory()}
        record["rows"].append({"name": name, **result})
        print(f"{name}: {result}", flush=True)
        if options.output:
            write_json(options.output, record)

    for budget in options.tokens_per_step or [chosen.tokens_per_step]:
        own = chosen.model_copy(update={"tokens_per_step": budget})
        add(f"kestrel, tokens_per_step {budget}", time_kestrel(model, prompt, rows, own))
    if options.stock_batches:
        contexts = [question.context for question in asked]
        add("stock", time_stock(model, prompt, contexts, chosen, options.stock_batch, options.stock_batches))


def auto_or_number(text: str) -> int | str:
    """The type of --tokens_per_step."""
    return text if text == "auto" else at_least_one(text)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, help="JSON file of the results, written after every row")
    parser.add_argument("--config", type=Path, help=f"({_FALCON}; with --shape {CONFIG})")
    parser.add_argument("--model", type=Path, help="folder of the model; written where there is none (a temporary one)")
    parser.add_argument(
        "--profile", choices=tuple(PROFILES), default="gpu", help="which Falcon is written, without --shape"
    )
    parser.add_argument("--shape", metavar="NAME", choices=SHAPES, help=f"model that is written: {', '.join(SHAPES)}")
    parser.add_argument(
        "--layers", type=at_least_one, help="decoder layers of a model that is written: fewer for a trial"
    )
    parser.add_argument("--replies", type=at_least_one, default=7801, help="replies to answer (ConvAI2's 7,801)")
    parser.add_argument("--new-tokens", type=at_least_one, default=24, help="tokens of each answer (24)")
    parser.add_argument(
        "--tokens_per_step",
        type=auto_or_number,
        nargs="+",
        metavar="N",
        help="a row for each, a number or auto (the config's)",
    )
    parser.add_argument("--stock-batch", type=at_least_one, default=512, help="prompts of a batch of stock (512)")
    parser.add_argument("--stock-batches", type=int, default=3, help="batches of stock that are timed; 0 for no row")
    options = parser.parse_args(argv)

    def measured() -> int:
        with tempfile.TemporaryDirectory() as temporary:
            benchmark(options, Path(temporary), command_of("generate.py", argv))
        return 0

    return told(measured)


if __name__ == "__main__":
    sys.exit(main())
