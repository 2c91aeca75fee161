"""Times the fast layers on shapes of well-known models with arbitrary weights: passes of real lengths, no optimizer.

    python benchmarks/layers.py --lengths LENGTHS.json --output RESULTS.json qwen2.5-7b:none qwen2.5-7b:full ...

LENGTHS.json is a list of tokens of dialogues. A run is SHAPE:RECOMPUTE[:TOKENS_PER_STEP[:stock]]; stock goes through
transformers' layers. Before it is timed, the same shape with two layers is held against transformers and PEFT.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.shapes import SHAPES, config_of
from kestrel.batching import even_batches_within, steps_of_run
from kestrel.config.settings import Data, Lora, Model, Quantization, Settings
from kestrel.model.loss import attach_token_nll, causal_lm_of, collate, nll_of_hidden, token_nll
from kestrel.planning.random_base import random_model


def _model_of(shape: str) -> str:
    """The name in `SHAPES`; `-qkv` says which layers have LoRA."""
    return shape.removesuffix("-qkv")


def make(shape: str, dtype: str, dropout: float, layers: int | None = None) -> Any:
    config = config_of(_model_of(shape), layers)
    config._attn_implementation = "sdpa"
    settings = Settings(
        run_dir="unused",
        data=Data(source="unused"),
        model=Model(name="unused"),
        quantization=Quantization(compute_dtype=dtype),
        lora=Lora(target_modules=["query_key_value"] if shape.endswith("-qkv") else "all-linear", dropout=dropout),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(settings, config, device)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(1e4 ** -torch.linspace(0, 1, len(buffer) + 1)[:-1])
    return model.train()


def rows_of(lengths: np.ndarray, vocabulary: int, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = random.integers(5, vocabulary, length)
        labels = np.where(np.arange(length) % 100 < 37, ids, -100)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def fast(model: Any, recompute: str) -> Any:
    attach_token_nll(model, recompute)  # type: ignore[arg-type]
    return lambda batch: token_nll(model, batch).sum()


def stock(model: Any, recompute: str) -> Any:
    causal_lm = causal_lm_of(model)
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    if recompute == "full":
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        states = backbone(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, batch["predicting"])
        return nll_of_hidden(causal_lm, hidden, batch["labels"].flatten()[batch["predicting"] + 1]).sum()

    return loss


def on_device(batch: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def check(shape: str, dtype: str) -> dict[str, float]:
    """Relative differences of loss and LoRA gradients from transformers' and PEFT's, two layers, no dropout."""
    model = make(shape, dtype, dropout=0.0, layers=2)
    lengths = np.asarray([61, 200, 128])
    vocabulary = SHAPES[_model_of(shape)][1]["vocab_size"]
    batch = on_device(collate(rows_of(lengths, vocabulary, 1), 2), model)
    found = {}
    gradients, losses = [], []
    for loss_of in (stock(model, "none"), fast(model, "none"), fast(model, "full")):
        model.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    apart = {n: ((gradients[1][n] - g).norm() / g.norm()).item() for n, g in gradients[0].items()}
    worst = max(apart, key=lambda n: apart[n])
    found = {"loss": abs(losses[1] / losses[0] - 1), "gradient": apart[worst], "worst": worst.split("layers.")[-1]}
    found["recomputed_alike"] = all(torch.equal(gradients[1][n], g) for n, g in gradients[2].items())
    return found


def matrix_rate() -> float:
    """FLOP/s of a product of 8192 x 8192 in bfloat16."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def measure(name: str, lengths: np.ndarray, dtype: str, steps: int, profile: bool) -> dict[str, Any]:
    shape, recompute, *rest = name.split(":")
    budget = int(rest[0]) if rest else 16384
    model = make(shape, dtype, dropout=0.05)
    cuda = next(model.parameters()).is_cuda
    loss_of = (stock if rest[1:] == ["stock"] else fast)(model, recompute)
    vocabulary = SHAPES[_model_of(shape)][1]["vocab_size"]
    plan = steps_of_run(lengths, 32, 1.0, steps + 2, 0)
    seconds, tokens = [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trace = None
    for index, chosen in enumerate(plan):
        cuts = even_batches_within(lengths[chosen], budget)
        rows = rows_of(lengths[chosen], vocabulary, index)
        batches = [on_device(collate([rows[i] for i in cut], 2), model) for cut in cuts]
        model.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        if profile and cuda and index == len(plan) - 1:
            trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            trace.__enter__()
        began = time.perf_counter()
        for batch in batches:
            loss_of(batch).backward()
        if cuda:
            torch.cuda.synchronize()
        if trace is not None:
            trace.__exit__(None, None, None)
        else:
            seconds.append(time.perf_counter() - began)
            tokens.append(int(lengths[chosen].sum()))
    rates = [t / s for t, s in zip(tokens[2:], seconds[2:], strict=True)]
    linear = sum(p.quant_state.shape.numel() for p in model.parameters() if getattr(p, "quant_state", None) is not None)
    result = {
        "run": name,
        "tokens_per_second": round(statistics.median(rates)),
        "range": [round(min(rates)), round(max(rates))],
        "first_step_seconds": round(seconds[0], 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "linear_parameters": linear,
    }
    if trace is not None:
        table = [(e.key[:70], e.self_device_time_total / 1e3, e.count) for e in trace.key_averages()]
        result["kernels_ms"] = [[k, round(t, 2), c] for k, t, c in sorted(table, key=lambda row: -row[1])[:24]]
        result["profiled_tokens"] = int(lengths[plan[-1]].sum())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--lengths", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    lengths = np.asarray(json.loads(Path(options.lengths).read_text()))
    results: dict[str, Any] = {"device": "cpu", "runs": [], "checks": {}}
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
        results["matrix_rate"] = matrix_rate()
    for name in options.runs:
        shape = name.split(":")[0]
        try:
            if shape not in results["checks"]:
                results["checks"][shape] = check(shape, options.dtype)
                print(shape, results["checks"][shape], flush=True)
            found = measure(name, lengths, options.dtype, options.steps, options.profile)
            if "matrix_rate" in results:
                used = 4 * found["linear_parameters"] * found["tokens_per_second"]
                found["of_matrix_rate"] = round(used / results["matrix_rate"], 3)
        except Exception as error:  # noqa: BLE001  the next shape may do
            import traceback

            traceback.print_exc()
            found = {"run": name, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({k: v for k, v in found.items() if k != "kernels_ms"}), flush=True)
        for line in found.get("kernels_ms", []):
            print("   ", *line)
        results["runs"].append(found)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        Path(options.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
