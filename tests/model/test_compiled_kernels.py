"""Every Triton kernel compiles for every card and fits it. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kestrel.errors import KestrelError
from kestrel.model.kernels import attention_gpu, cards

# Triton makes the same code for sm_86 and sm_89 as for sm_80; they differ in their limits, to which it is held too.
HELD_TO = {75: [75], 80: [80, 86, 89], 90: [90], 100: [100], 120: [120]}


@pytest.mark.parametrize("compiled_for", HELD_TO)
def test_every_kernel_fits_the_card(compiled_for: int) -> None:
    """In a process of its own, because in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled_kernels.py")
    command = [sys.executable, str(script), str(compiled_for)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    usage: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(usage) >= 15
    for row, card in ((row, card) for row in usage for card in HELD_TO[compiled_for]):
        if row["launch"].endswith("256 ranks") and card in (86, 89):
            continue  # there the widest products hold 128
        assert row["shared"] <= cards.SHARED_MEMORY[divmod(card, 10)], row
        assert 32 * row["warps"] * row["registers"] <= cards.REGISTERS, row
        assert row["spilled"] <= 1024, row  # bytes of a thread; on sm_75 products spilled thousands
        if row["launch"].startswith("attention"):
            size = int(row["launch"].split(",")[1].split()[-1])
            assert row["shared"] <= attention_gpu._SHARED_MEMORY[size], row


@pytest.mark.parametrize(
    ("card", "sizes", "dtype"),
    [("sm_75", [], "float16"), ("sm_86", [64, 128], "bfloat16"), ("sm_90", [64, 128], "bfloat16")],
)
def test_a_card_can_be_forced(monkeypatch: pytest.MonkeyPatch, card: str, sizes: list[int], dtype: str) -> None:
    monkeypatch.setenv("KESTREL_CARD", card)
    monkeypatch.setattr(cards, "capability", cards.capability.__wrapped__)
    queries = [torch.empty(1, 2, 3, size, dtype=torch.bfloat16, device="meta") for size in (64, 80, 96, 128, 256)]
    assert [query.shape[-1] for query in queries if attention_gpu.supports(query)] == sizes
    assert (cards.name(), cards.best_dtype()) == (card, dtype)
    monkeypatch.setenv("KESTREL_CARD", "T4")
    with pytest.raises(KestrelError, match="KESTREL_CARD is 'T4'; expected a compute capability such as sm_75"):
        cards.capability()


def test_limits_of_cards_between_those_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in (((8, 8), 166_912), ((11, 0), 232_448), ((12, 1), 101_376), ((6, 1), 98_304), (None, 0)):
        monkeypatch.setattr(cards, "capability", lambda found=found: found)
        assert cards.shared_memory() == expected
