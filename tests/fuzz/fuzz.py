"""Coverage-guided fuzzing of all that reads files or options, with atheris (libFuzzer for Python).

    python tests/fuzz/fuzz.py --runs 5000                  so many inputs to each target
    python tests/fuzz/fuzz.py --runs 100000 parlai config  to some targets only
    python tests/fuzz/fuzz.py --share 1000000              so many in all, shared out by what a target is worth

Each target has a process of its own: a bug ends it, and its input stands in runs/fuzz/TARGET/found/. What was reached
is kept in runs/fuzz/TARGET/corpus/, and the next call begins there and at tests/fuzz/corpus/TARGET/. An input may take
`SECONDS` and a process `MEGABYTES`. With --record the results are added to tests/fuzz/results.json, of which
docs/fill_reliability.py makes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KEPT = ROOT / "runs" / "fuzz"
RESULTS = HERE / "results.json"
SECONDS, MEGABYTES, LONGEST = 10, 3072, 4096
# What a target is worth of --share: a line of options costs 20 ms, a run's artifacts 4, most others half a millisecond.
WORTH = {"evaluation": 0.2, "options": 0.05, "artifacts": 0.4, "config": 0.7, "prompt": 0.2}
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]

from make_corpora import LAYOUTS

from kestrel.runtime.manifest import git_commit


def fuzz(target: str, arguments: list[str]) -> None:
    """Runs one target in this process; libFuzzer never returns."""
    import atheris

    with atheris.instrument_imports(include=["kestrel", "yaml"]):
        import targets

        targets.prepare(target)
    from mutate import mutate

    def mutator(data: bytes, limit: int, seed: int) -> bytes:
        return mutate(data, limit, seed, atheris.Mutate)

    accepted = 0

    def one(data: bytes) -> None:
        nonlocal accepted
        if targets.try_input(target, data):
            accepted += 1
            if accepted % 10 == 0:
                (KEPT / target / "accepted").write_text(str(accepted))

    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=mutator)
    atheris.Fuzz()


def measure(target: str, runs: int, seed: int) -> dict[str, object]:
    """One target in a process of its own; what libFuzzer counted."""
    corpus, found = KEPT / target / "corpus", KEPT / target / "found"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    if target in LAYOUTS:
        (corpus / "layout").write_text(LAYOUTS[target], encoding="utf-8")
    seeds = HERE / "corpus" / target
    arguments = [
        f"-runs={runs}", f"-seed={seed}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}",
        f"-artifact_prefix={found}/", "-print_final_stats=1", "-verbosity=1", str(corpus),
        *([str(seeds)] if seeds.is_dir() else []),
    ]  # fmt: skip
    began = time.monotonic()
    (KEPT / target / "accepted").write_text("0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(KEPT / f"{target}.log", "wb") as log:
        command = [sys.executable, str(HERE / "fuzz.py"), "--one", target, *arguments]
        status = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stderr=log, stdout=log
        )
    said = (KEPT / f"{target}.log").read_text(encoding="utf-8", errors="replace")
    counted = re.search(r"number_of_executed_units:\s*(\d+)", said)
    reached = re.findall(r"cov: (\d+) ft: (\d+)", said)
    peak = re.search(r"peak_rss_mb:\s*(\d+)", said)
    return {
        "target": target,
        "inputs": int(counted[1]) if counted else 0,
        "accepted": int((KEPT / target / "accepted").read_text()),
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "edges": int(reached[-1][0]) if reached else 0,
        "peak_megabytes": int(peak[1]) if peak else 0,
        "clean": status.returncode == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--share", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="add the results to tests/fuzz/results.json")
    options = parser.parse_args()
    from targets import TARGETS

    chosen = options.targets or list(TARGETS)
    worth = {target: WORTH.get(target, 1.0) for target in chosen}
    clean = True
    for target in chosen:
        runs = int(options.share * worth[target] / sum(worth.values())) + 1 if options.share else options.runs
        result = measure(target, runs, options.seed)
        clean &= bool(result["clean"])
        print(json.dumps(result), flush=True)
        if not result["clean"]:
            print(f"  a bug, or too slow, or too large: see runs/fuzz/{target}.log and runs/fuzz/{target}/found/")
        if options.record:
            record(result)
    return 0 if clean else 1


def record(result: dict[str, object]) -> None:
    """Adds one result to results.json."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": []}
    when = {"date": datetime.now(UTC).date().isoformat(), "commit": (git_commit() or "")[:10]}
    known["runs"].append({**result, **when, "python": platform.python_version()})
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
