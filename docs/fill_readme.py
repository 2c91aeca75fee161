"""Fills the generated blocks of README.md and of two pages, so that no number in them is typed by hand.

make readme        runs the quickstart for its output and times; the tables come from the settings and benchmarks
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from blocks import ROOT, fill_page, table

sys.path.insert(0, str(ROOT))
RUN = "runs/quickstart"
SCRIPTS = ("preprocess.py", "train.py", "generate.py", "evaluate.py")
# The keys that users edit most; `--help` lists all.
SHOWN_KEYS = (
    "data.source", "data.format", "prompt.format", "prompt.max_length", "model.name", "quantization.bits",
    "quantization.compute_dtype", "lora.r", "lora.alpha", "lora.dropout", "lora.target_modules", "training.epochs",
    "training.batch_size", "training.tokens_per_step", "training.learning_rate", "training.recompute",
    "training.resume", "generation.split", "generation.max_new_tokens", "generation.do_sample",
    "generation.num_beams", "generation.candidates", "evaluation.normalization", "evaluation.extra_metrics",
)  # fmt: skip


def machine() -> str:
    """One line: processor, cores, versions, commit and date."""
    from kestrel.runtime.manifest import git_commit, library_versions

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = library_versions()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return (
        f"{cpu}, {os.cpu_count()} cores, Python {versions['python']}, {named}; commit {(git_commit() or '')[:10]}, "
        f"{datetime.datetime.now(tz=datetime.UTC).date()}"
    )


def run_quickstart() -> tuple[str, str]:
    """Runs the four scripts as `make quickstart` does. Returns their output and a sentence with the time each took.

    Raises:
        SystemExit: the run folder exists, so the scripts would resume instead of starting over.
    """
    if (ROOT / RUN).exists():
        raise SystemExit(f"{RUN} exists, so the scripts would resume that run; remove the folder first")
    outputs, seconds = [], []
    for script in SCRIPTS:
        command = ["python", script, "--config", "configs/quickstart.yaml"]
        if script == "preprocess.py":
            command += ["--show", "1"]
        start = time.monotonic()
        done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
        outputs.append(f"$ {' '.join(command)}\n{done.stdout.strip()}")
    each = ", ".join(f"{script} {taken:.0f} s" for script, taken in zip(SCRIPTS, seconds, strict=True))
    return "\n\n".join(outputs), f"{sum(seconds):.0f} s in all ({each}) on {machine()}."


def cards_table() -> str:
    """Memory of the configs: measured where there is a record, else by the dry run's estimate."""
    results = ROOT / "benchmarks" / "results"
    record = json.loads((results / "train-gpu-today.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`{row['config']}`",
            f"{row['peak_bytes'] / 2**30:.1f} GiB",
            f"{row['useful_tokens_per_second']:,.0f} tokens/s",
        ]
        for row in reversed(record["rows"])
        if row["kind"] == "kestrel"
    ]
    estimates = json.loads((results / "cards.json").read_text(encoding="utf-8"))["rows"]
    for config in dict.fromkeys(row["config"] for row in estimates):
        fitting = [row for row in estimates if row["config"] == config and row["fits"]]
        if fitting:
            named = ", ".join(f"{row['peak_gib']:.1f} GiB on {row['card']}" for row in fitting)
            rows.append([f"`configs/{config}.yaml`", f"{named}, estimated", ""])
    versions = record["versions"]
    named = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return (
        f"{table(['config', 'peak GPU memory in training', 'speed'], rows)}\n\n"
        f"Random weights of each model's exact shape, {record['dialogues'] // 5} of ConvAI2's dialogues, each five times, a single run a row. "
        f"Measured on {record['device']}, {named}, {record['date']}; the others are estimates of `benchmarks/cards.py`."
    )


def settings_table() -> str:
    """Default and meaning of SHOWN_KEYS."""
    from kestrel.config.keys import all_keys

    keys = all_keys()
    rows = []
    for name in SHOWN_KEYS:
        key = keys[name]
        default = "" if key.field.is_required() else f"`{key.default.removeprefix('default: ')}`"
        rows.append([f"`{name}`", default, str(key.field.description).replace("|", r"\|")])
    return table(["key", "default", "meaning"], rows)


def excerpt(output: str) -> str:
    """The lines of the quickstart's output that say what was achieved: 15 at most."""
    lines = output.splitlines()
    kept = [line for line in lines if line.startswith(("best validation loss", "it learned", "proven: saved"))]
    scores = lines.index(next(line for line in lines if line.startswith("Scores with 95% intervals")))
    kept += [line for line in lines[scores : scores + 12] if line]
    return "\n".join(kept + [line for line in lines if line.startswith("adapter beats base")])


def printed() -> str:
    """What the quickstart printed when docs/quickstart.md was filled."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    return page.partition("```text\n")[2].partition("\n```\n<!-- end -->")[0]


def blocks(page: str = "README.md") -> dict[str, str]:
    """The content of a page's blocks that need no run."""
    if page == "docs/settings.md":
        return {"settings": settings_table()}
    return {"cards": cards_table(), "quickstart excerpt": f"```text\n{excerpt(printed())}\n```"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings-only", action="store_true", help="do not run the quickstart; keep its output and times"
    )
    arguments = parser.parse_args(argv)
    if not arguments.settings_only:
        output, timing = run_quickstart()
        fill_page("docs/quickstart.md", {"quickstart output": f"```text\n{output}\n```", "quickstart times": timing})
    for page in ("docs/settings.md", "README.md"):
        fill_page(page, blocks(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
