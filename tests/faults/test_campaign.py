"""A short fault campaign; docs/reliability.md has the long ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

from children import python
from faults.runs import THE_CHAIN


def test_kills_signals_and_damaged_files_at_random(tmp_path: Path) -> None:
    """One trial for each fault and script, drawn again each time; a failure names the seed that repeats it.

    `make test` has no time for the campaign's other stages."""
    seed = random.SystemRandom().randrange(10**6)
    command = [
        "tests/faults/campaign.py",
        "--stages",
        *THE_CHAIN,
        "--trials",
        "15",
        "--seed",
        str(seed),
        "--output",
        str(tmp_path / "r.json"),
    ]
    done = python(*command, "--faults", "kill", "signal", "damage")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert sum(kind["trials"] for kind in results.values()) == 15
    assert sum(kind["interruptions_that_hit"] for name, kind in results.items() if name != "damage") > 0
