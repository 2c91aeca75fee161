"""Compiles every Triton kernel as it is launched for a card that need not be there, and prints what each takes.

    python tests/model/compiled_kernels.py 75 80 90

The functions that launch kernels run on the meta device; each launch is compiled in place of being run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kestrel.model.kernels import attention_gpu, cards, elementwise_gpu, low_rank_gpu, rotary_gpu

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def compiled(kernel: Any, capability: int, given: dict[str, Any]) -> dict[str, Any]:
    """Shared memory, registers of a thread and bytes of spilled ones, of a kernel as it would be launched."""
    options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    signature, constants, divisible = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
        free = parameter.do_not_specialize or isinstance(value, float)
        if isinstance(value, torch.Tensor) or (not free and value % 16 == 0):
            divisible[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(part.split(":") for part in usage.split() if part.count(":") == 1 and not part.endswith(":"))
    return {
        "shared": result.metadata.shared,
        "registers": int(found["REG"]),
        "spilled": int(found["LOCAL"]) + int(found["STACK"]),
        "warps": result.metadata.num_warps,
    }


def launches(dtype: torch.dtype, sizes: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel as training launches it, at the widths of 7B models."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    e, low = elementwise_gpu, low_rank_gpu
    wide, inner, weight, rows = (
        tensor(512, 4544),
        tensor(512, 2 * 11008),
        tensor(4544),
        tensor(512, dtype=torch.float32),
    )
    for name, bias in (("layer norm", weight), ("RMS norm", None)):
        yield name, lambda bias=bias: e.norm(wide, weight, bias, 1e-5)
        yield f"{name}, backward", lambda bias=bias: e.norm_backward(wide, wide, (rows, rows), weight, bias, 0.0, wide)
    for kind in ("silu", "gelu", "gelu_tanh"):
        gated = kind != "gelu"
        yield kind, lambda kind=kind, gated=gated: e.activate(inner, kind, gated)
        grad = tensor(512, 11008 if gated else 22016)
        yield f"{kind}, backward", lambda *, g=grad, k=kind, y=gated: e.activate_backward_(g, inner, k, y, True)
    yield "likelihoods", lambda: e.nll(tensor(512, 65024), tensor(512, dtype=torch.int64), True)
    byte, constant = tensor(4544 * 2272, 1, dtype=torch.uint8), tensor(256, dtype=torch.float32)
    nested = SimpleNamespace(code=constant, absmax=constant)
    state = SimpleNamespace(
        code=constant, absmax=byte, state2=nested, offset=constant, shape=torch.Size((4544, 4544))
    )  # fmt: skip
    yield "dequantization", lambda: e.dequantize(byte, state, dtype)
    for ranks in () if cards.is_before_ampere() else sorted({16, 128, low.widest()}):
        a, narrow = tensor(ranks, 4544), tensor(512, ranks)
        yield f"project, {ranks} ranks", lambda a=a: low.project(wide, a, 0.05, 2**40)
        yield f"gradient of A, {ranks} ranks", lambda n=narrow: low.project_gradient(n, wide, 0.05, 2**40)
        yield f"gradient of x, {ranks} ranks", lambda a=a, n=narrow: low.add_input_gradient_(wide, n, a, 0.05, 2**40)
    for size in sizes:
        out = tensor(2, 300, 36, size)
        cos = tensor(300, size)
        yield (
            f"rotation, heads of {size}",
            lambda o=out, c=cos: rotary_gpu.rotate(o.split((28, 4, 4), 2), c, c, o, False),
        )
        query, key = tensor(2, 71, 300, size), tensor(2, 1, 300, size)
        if attention_gpu.supports(query):
            yield f"attention, heads of {size}", lambda q=query, k=key: attention_gpu.attend(q, k, k)
            given = tensor(2, 300, 71, size), tensor(2, 300, 71, dtype=torch.float32)
            yield (
                f"attention, heads of {size}, backward",
                lambda q=query, k=key, g=given: attention_gpu.attend_backward(q, q, k, k, *g),
            )


class Launch:
    """Stands for a kernel: what launches it compiles it, and adds what it takes to `found`."""

    def __init__(self, kernel: Any, capability: int, found: list[dict[str, Any]]):
        self._kernel, self._capability, self._found = kernel, capability, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            given = dict(zip(self._kernel.arg_names, arguments, strict=False)) | named
            usage = compiled(self._kernel, self._capability, given)
            self._found.append({"capability": self._capability, "kernel": self._kernel.__name__, **usage})

        return launch


def main(capabilities: list[int]) -> None:
    modules = (attention_gpu, elementwise_gpu, low_rank_gpu, rotary_gpu)
    kernels = [(m, n, kernel) for m in modules for n, kernel in list(vars(m).items()) if n.endswith("_kernel")]
    for capability in capabilities:
        os.environ["KESTREL_CARD"] = f"sm_{capability}"
        cards.capability.cache_clear()
        found: list[dict[str, Any]] = []
        for module, name, kernel in kernels:
            setattr(module, name, Launch(kernel, capability, found))
        for name, call in launches(torch.float16 if capability < 80 else torch.bfloat16, [64, 80, 96, 128, 256]):
            done = len(found)
            call()
            for row in found[done:]:
                print(json.dumps({"launch": name, **row}), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
