"""Adds one measure of training speed at a time and says what each brings.

    python benchmarks/falcon_7b_shape.py --output /tmp/falcon
    python benchmarks/waterfall.py --model /tmp/falcon --output benchmarks/results/waterfall.json [--text FILE]

It begins with transformers' own model under PEFT: whole dialogues in random order, right-padded with a mask, all logits.
Each row keeps what the rows before it added. One optimizer step is one batch; the last rows change how much is in a batch
and how much is kept for the backward pass. Every row's loss of the same batch is held against the first row's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import machine
from benchmarks.options import command_of, parser_of, told
from benchmarks.profiles import read_dialogues
from kestrel.adapter.lora import add_lora
from kestrel.config.settings import Data, Lora, Model, Quantization, Settings
from kestrel.model import loss
from kestrel.model.base import load_base, skeleton_of
from kestrel.model.decoder_layer import Recompute
from kestrel.model.kernels import attention, elementwise
from kestrel.model.kernels.attention import stock_attention
from kestrel.model.quantization import linear_layers
from kestrel.prompt.load import load_prompt
from kestrel.prompt.prompt import IGNORED, Rendered
from kestrel.runtime.atomic import write_json
from kestrel.runtime.manifest import git_commit, library_versions

Batch = dict[str, torch.Tensor]
_WARMUP = 3
_TIMED = 256  # dialogues, and at least six steps
_REPEAT = 5  # of the dialogues, so that batches of many hold similar lengths as in a corpus of thousands
_SAME = 2e-2  # bfloat16's rounding through 32 layers, as `loss.prove_loss` allows it


def all_logits(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def at_labels(model: Any, batch: Batch) -> torch.Tensor:
    causal_lm = loss.causal_lm_of(model)
    hidden = causal_lm.transformer(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    return F.cross_entropy(causal_lm.lm_head(hidden[:, :-1][kept]).float(), targets[kept])


def own_layers(model: Any, batch: Batch) -> torch.Tensor:
    return loss.token_nll(model, batch).mean()


@contextmanager
def plain_pieces() -> Iterator[None]:
    """Without the Triton kernels."""
    with contextlib.ExitStack() as stack:
        for module in (attention, elementwise):
            stack.enter_context(mock.patch.object(module, "place_of", lambda x: "torch"))
        yield


@dataclass(frozen=True)
class Measure:
    """One row.

    Attributes:
        what: it adds to the row before.
        forward: (model, batch) → mean loss.
        under: what is changed meanwhile.
        dialogues: in a batch.
        by_length: whether a batch holds dialogues of similar length.
        recompute: of Kestrel's own layers.
    """

    what: str
    forward: Callable[[Any, Batch], torch.Tensor]
    under: Callable[[], AbstractContextManager[None]] = nullcontext
    dialogues: int = 32
    by_length: bool = True
    recompute: Recompute = "none"


MEASURES = (
    Measure("transformers and PEFT, random batches of 32 dialogues", all_logits, stock_attention, by_length=False),
    Measure("+ batches of similar length", all_logits, stock_attention),
    Measure("+ projection at labels only", at_labels, stock_attention),
    Measure("+ the key/value head as a view for all heads", at_labels),
    Measure("+ own layers and head: no mask, little kept, nothing in float32", own_layers, plain_pieces),
    Measure("+ kernels for attention, dropout, GELU, rotary positions, norms, dequantization, likelihoods", own_layers),
    Measure("+ weights kept dense", own_layers, recompute="dense"),
    Measure("  the same, 64 dialogues", own_layers, dialogues=64, recompute="dense"),
    Measure("  the same, 96 dialogues", own_layers, dialogues=96, recompute="dense"),
    Measure("  recompute: mlp, 32 dialogues", own_layers, recompute="mlp"),
    Measure("  recompute: full, 32 dialogues", own_layers, recompute="full"),
    Measure("  recompute: none, 7 dialogues", own_layers, dialogues=7),
    Measure("  recompute: mlp, 10 dialogues", own_layers, dialogues=10, recompute="mlp"),
    Measure("  recompute: mlp, 5 dialogues", own_layers, dialogues=5, recompute="mlp"),
    Measure("  recompute: full, 10 dialogues", own_layers, dialogues=10, recompute="full"),
)


def batches_of(rows: list[Rendered], measure: Measure, device: torch.device) -> list[tuple[Batch, int]]:
    """As many batches as a row needs, each with its number of tokens, spread evenly over the lengths."""
    order = np.random.default_rng(0).permutation(len(rows))
    if measure.by_length:
        order = order[np.argsort([len(rows[i].input_ids) for i in order], kind="stable")]
    count = _WARMUP + max(6, _TIMED // measure.dialogues)
    places = np.linspace(0, max(0, len(rows) - measure.dialogues), count).astype(int)
    batches = []
    for first in np.random.default_rng(1).permutation(places):
        chosen = [rows[i] for i in order[first : first + measure.dialogues]]
        batch = loss.collate([{"input_ids": row.input_ids, "labels": row.labels} for row in chosen], pad_id=0)
        batches.append(({k: v.to(device) for k, v in batch.items()}, sum(len(row.input_ids) for row in chosen)))
    return batches


def measured(model: Any, measure: Measure, rows: list[Rendered], own_forward: Any, probe: Batch) -> dict[str, Any]:
    """Tokens a second, padding, peak bytes, and the loss of `probe`."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    loss.causal_lm_of(model).forward = own_forward
    if measure.forward is own_layers:
        loss.attach_token_nll(model, measure.recompute)
    model.eval()
    with measure.under(), torch.no_grad():
        probed = measure.forward(model, probe).item()
    model.train()
    gc.collect()
    torch.cuda.empty_cache()
    machine.reset_peak_memory()
    tokens = positions = 0
    with measure.under():
        for number, (batch, real) in enumerate(batches_of(rows, measure, device)):
            if number == _WARMUP:
                machine.synchronize()
                began = time.perf_counter()
            if number >= _WARMUP:
                tokens, positions = tokens + real, positions + batch["input_ids"].numel()
            measure.forward(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        machine.synchronize()
    return {
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "padding_share": 1 - tokens / positions,
        "peak_bytes": machine.peak_memory(),
        "probe_loss": probed,
    }


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder of a Falcon")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    options = parser.parse_args(argv)
    return told(lambda: waterfall(options, command_of("waterfall.py", argv)))


def waterfall(options: argparse.Namespace, command: str) -> int:
    """Times one measure after the other; the record is written after each."""
    dtype = machine.compute_dtype()
    rate = machine.matrix_rate(8192 if torch.cuda.is_available() else 1024, dtype)
    settings = Settings(
        run_dir="unused", data=Data(source="unused"), model=Model(name=options.model), lora=Lora(),
        quantization=Quantization(compute_dtype=dtype),
    )  # fmt: skip
    prompt = load_prompt(settings, 512)
    rendered = prompt.render_all(read_dialogues(options.text))
    rows = [row for row in rendered if isinstance(row, Rendered)] * _REPEAT
    base, audit = load_base(settings)
    model = add_lora(base, settings.lora, seed=0)
    linear = sum(inputs * outputs for inputs, outputs in linear_layers(skeleton_of(base.config)).values())
    own_forward = loss.causal_lm_of(model).forward
    probe = batches_of(rows, Measure("", own_layers, dialogues=4), base.device)[0][0]
    record: dict[str, Any] = {
        "command": command,
        "device": machine.device_name(),
        "versions": library_versions(),
        "commit": git_commit(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "audit": audit.as_json(),
        "matrix_flops": rate,
        "rows": [],
    }
    print(f"{machine.device_name()}: {rate / 1e12:,.0f} TFLOP/s; {audit.line()}")
    for measure in MEASURES:
        try:
            row = measured(model, measure, rows, own_forward, probe)
        except torch.OutOfMemoryError:
            row = {"out_of_memory": True}
        else:
            row["utilisation"] = 4 * linear * row["tokens_per_second"] / rate
            first = record["rows"][0]["probe_loss"] if record["rows"] else row["probe_loss"]
            if abs(row["probe_loss"] - first) > _SAME * first:
                raise SystemExit(f"{measure.what}: loss {row['probe_loss']} where the first row has {first}")
        record["rows"].append({"what": measure.what, "dialogues": measure.dialogues, **row})
        write_json(options.output, record)
        print(record["rows"][-1], flush=True)
    record["matrix_flops_afterwards"] = machine.matrix_rate(8192 if torch.cuda.is_available() else 1024, dtype)
    write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
