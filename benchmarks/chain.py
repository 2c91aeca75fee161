"""Runs the four scripts with a config and records wall time, peak memory and what they printed.

    python benchmarks/falcon_7b_shape.py --output /tmp/falcon
    python benchmarks/chain.py --output benchmarks/results/chain.json -- --config configs/falcon-7b.yaml \\
        --model.name /tmp/falcon --data.source FILE --run_dir /tmp/run

Each script runs in a process of its own. Peak memory is torch's on a GPU, the process's resident set without one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("preprocess", "train", "generate", "evaluate")
_MARK = "measured: "


def run_here(script: str, argv: list[str]) -> int:
    """Runs one script in this process and prints what it took, as JSON behind a mark."""
    spec = importlib.util.spec_from_file_location(f"{script}_script", ROOT / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    began = time.monotonic()
    status = int(module.main(argv))
    facts: dict[str, Any] = {"exit_status": status, "seconds": round(time.monotonic() - began, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    facts["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(_MARK + json.dumps(facts))
    return status


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--here", choices=SCRIPTS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help="arguments of the scripts, after --")
    options = parser.parse_args(argv)
    if options.here:
        return run_here(options.here, options.arguments)

    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    results: dict[str, Any] = {}
    for script in options.scripts:
        command = [sys.executable, __file__, "--here", script, "--", *options.arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        measured: dict[str, Any] = next(
            (json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)), {}
        )
        printed = [line for line in lines if not line.startswith(_MARK)]
        results[script] = {**measured, "printed": printed}
        print(f"{script}: {measured}\n" + "\n".join(f"  {line}" for line in printed), flush=True)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            break
    if options.output:
        record = {
            "command": f"python benchmarks/chain.py -- {' '.join(options.arguments)}",
            "device": device_name(),
            "versions": library_versions(),
            "commit": git_commit(),
            "date": datetime.now(tz=UTC).date().isoformat(),
            "scripts": results,
        }
        write_json(options.output, record)
    return max((int(result.get("exit_status", 1)) for result in results.values()), default=1)


if __name__ == "__main__":
    sys.exit(main())
