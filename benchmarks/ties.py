"""Counts the greedy answers in which Kestrel and transformers part, and how near to a tie they do.

    python benchmarks/ties.py --text DIALOGUES --model FOLDER --config configs/smollm2-135m.yaml --output RESULTS.json

Some replies of the text are answered by Kestrel as generate.py does, many at once, and by transformers' own generate, one at a
time and with its own attention; by the base with an adapter whose weights are random. Where two answers part, the prompt and what
they share go through transformers' model once more: the gap is how far the logit of Kestrel's token lies below that of
transformers'. In float32 the answers are equal. In bfloat16, which holds a number to 1 part in 128, they part where two tokens
are nearly as likely; as a control, so do those that transformers makes in batches.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks import machine
from benchmarks.generate import plain_logits, rows_of
from benchmarks.options import at_least_one, command_of, parser_of, told
from benchmarks.profiles import read_dialogues
from kestrel.adapter.lora import add_lora
from kestrel.config.resolve import resolve
from kestrel.generation.answers import questions_of
from kestrel.generation.decoding import decode, pad_left
from kestrel.generation.prefix_cache import compute_prefixes
from kestrel.generation.respond import generate, generation_config
from kestrel.model.base import load_base
from kestrel.model.dense_weights import dense_weights
from kestrel.model.kernels.attention import stock_attention
from kestrel.model.likelihood import SpanRequest
from kestrel.model.loss import attach_token_nll
from kestrel.prompt.load import load_prompt
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import git_commit, library_versions

_BATCH = 64


def until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and including the first that ends."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


@torch.no_grad()
def by_kestrel(model: Any, contexts: list[list[int]], settings: Any, ends: Collection[int]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    with dense_weights(model):
        for prefixes, _ in compute_prefixes(model, [SpanRequest(ids, []) for ids in contexts], "auto"):
            chosen = [index for index in range(len(contexts)) if prefixes.holds(index)]
            rows = prefixes.copy_rows([(index, len(contexts[index]) - 1) for index in chosen], settings.max_new_tokens)
            found |= zip(chosen, decode(model, rows, [contexts[i] for i in chosen], settings, ends), strict=True)
    return [until_end(found[index], ends) for index in range(len(contexts))]


@torch.no_grad()
def by_transformers(model: Any, context: list[int], config: Any, ends: Collection[int]) -> list[int]:
    ids = torch.tensor([context], device=next(model.parameters()).device)
    with stock_attention():
        answer: list[int] = generate(model, config, ids, torch.ones_like(ids), None)[0, len(context) :].tolist()
    return until_end(answer, ends)


@torch.no_grad()
def by_transformers_in_batches(
    model: Any, contexts: list[list[int]], config: Any, ends: Collection[int]
) -> list[list[int]]:
    """In batches of prompts of similar length, padded on the left."""
    found: dict[int, list[int]] = {}
    order = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
    for first in range(0, len(order), _BATCH):
        chosen = order[first : first + _BATCH]
        ids = pad_left([contexts[index] for index in chosen], config.pad_token_id)
        mask = pad_left([[1] * len(contexts[index]) for index in chosen], 0)
        device = next(model.parameters()).device
        with stock_attention():
            rows = generate(model, config, ids.to(device), mask.to(device), None)[:, ids.shape[1] :]
        found |= zip(chosen, rows.tolist(), strict=True)
    return [until_end(found[index], ends) for index in range(len(contexts))]


@torch.no_grad()
def gap_where_they_part(model: Any, context: list[int], ours: list[int], theirs: list[int]) -> dict[str, float]:
    """At the first token that differs: its place, and the gap of the logits, in spacings of bfloat16 and in deviations too."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    logits = plain_logits(model, context, theirs[: place + 1])[place]
    likeliest = logits[theirs[place]].item()
    gap = likeliest - logits[ours[place]].item()
    spacing = 2.0 ** (math.floor(math.log2(max(abs(likeliest), 1e-9))) - 7)  # of bfloat16's numbers there
    return {"place": place, "gap": gap, "spacings": gap / spacing, "deviations": gap / logits.std().item()}


def compare(options: Any, command: str) -> dict[str, Any]:
    given = {"model.name": str(options.model), "quantization.compute_dtype": options.dtype or machine.compute_dtype()}
    settings, _ = resolve(str(options.config), given)
    prompt = load_prompt(settings)
    chosen = settings.generation.model_copy(update={"max_new_tokens": options.new_tokens, "stop_strings": []})
    rows = rows_of(read_dialogues(options.text), prompt, options.replies)
    contexts = [question.context for questions in questions_of(rows, prompt) for question in questions]
    base, _ = load_base(settings)
    model: Any = add_lora(base, settings.lora, seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    attach_token_nll(model)
    model.eval()
    ours = by_kestrel(model, contexts, chosen, prompt.end_ids)
    config = generation_config(chosen, prompt)
    theirs = [by_transformers(model, context, config, prompt.end_ids) for context in contexts]
    parted = [
        gap_where_they_part(model, *three) for three in zip(contexts, ours, theirs, strict=True) if three[1] != three[2]
    ]
    gaps = np.abs([part["spacings"] for part in parted])
    in_batches = by_transformers_in_batches(model, contexts, config, prompt.end_ids)
    return {
        "command": command, "device": machine.device_name(), "compute_dtype": settings.quantization.compute_dtype,
        "versions": library_versions(), "commit": git_commit(), "date": datetime.now(tz=UTC).date().isoformat(),
        "model": options.model.name, "answers": len(contexts), "tokens": sum(map(len, theirs)),
        "equal": len(contexts) - len(parted), "equal_in_batches": sum(map(operator.eq, in_batches, theirs)), 
        "exact_ties": int((gaps == 0).sum()), "within_two_spacings": int((gaps <= 2).sum()),
        "largest_gap_in_spacings": float(gaps.max(initial=0)), "parted": parted,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "smollm2-135m.yaml", help="of the run")
    parser.add_argument("--replies", type=at_least_one, default=200, help="replies to answer (200)")
    parser.add_argument("--new-tokens", type=at_least_one, default=24, help="tokens of each answer (24)")
    parser.add_argument("--dtype", help="compute type (the machine's)")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args(argv)

    def compared() -> int:
        record = compare(options, command_of("ties.py", argv))
        if options.output:
            write_json(options.output, record)
        print({name: value for name, value in record.items() if name not in ("parted", "versions")})
        for part in record["parted"]:
            print(part)
        return 0

    return told(compared)


if __name__ == "__main__":
    sys.exit(main())
