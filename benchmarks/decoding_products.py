"""Times the product of a few rows with a 4-bit layer: by bitsandbytes' fused product, and with weights kept dense.

    python benchmarks/decoding_products.py --output benchmarks/results/decoding-products.json

`kestrel/model/dense_weights.py` keeps weights dense while answers are made; this shows from how many rows on that is faster.
The shapes are of Falcon-7B's and Qwen2.5-7B's layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from benchmarks import machine
from benchmarks.options import command_of
from kestrel.model.dense_weights import dense_weights
from kestrel.model.kernels import cards
from kestrel.runtime.atomic import write_json

_SHAPES = {
    "Falcon's up": (4544, 18176),
    "Falcon's qkv": (4544, 4672),
    "Qwen's gate": (3584, 18944),
    "Qwen's o": (3584, 3584),
}


def milliseconds(layer: nn.Module, x: torch.Tensor, repeat: int) -> float:
    """The median of some products after three for warm-up."""
    taken = []
    for _ in range(repeat + 3):
        machine.synchronize()
        began = time.perf_counter()
        layer(x)
        machine.synchronize()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken[3:])


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256], help="of the products")
    parser.add_argument("--shrink", type=int, default=1, help="divides the layers' sizes, to try this on a CPU")
    parser.add_argument("--repeat", type=int, default=50, help="products that are timed")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, cards.best_dtype())
    rows = []
    for name, shape in _SHAPES.items():
        inputs, outputs = (size // options.shrink // 64 * 64 for size in shape)
        layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = Params4bit(torch.randn(outputs, inputs), requires_grad=False, quant_type="nf4", module=layer)
        layer = layer.to(device).eval()
        layer.support_avx512bf16_for_cpu = False
        for count in options.rows:
            x = torch.randn(count, 1, inputs, device=device, dtype=dtype)
            row = {"layer": name, "shape": [inputs, outputs], "rows": count}
            row["fused_ms"] = milliseconds(layer, x, options.repeat)
            with dense_weights(layer):
                row["dense_ms"] = milliseconds(layer, x, options.repeat)
            rows.append(row)
            print(f"{name}, {count} rows: fused {row['fused_ms']:.3f} ms, dense {row['dense_ms']:.3f} ms", flush=True)
    record = {
        **machine.facts_of_a_measurement(command_of("decoding_products.py", argv)),
        "dtype": str(dtype),
        "rows": rows,
    }
    if options.output:
        write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
