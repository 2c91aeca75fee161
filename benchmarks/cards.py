"""Which config fits which card: `train.py --dry-run` for the shipped configs of 7B and 8B models, without their weights.

    python benchmarks/cards.py --text DIALOGUES --tokenizer FOLDER --output benchmarks/results/cards.json

The models have the shapes of `benchmarks/shapes.py` and the tokenizer of any model with a chat template; one with a smaller
vocabulary than that has a tokenizer trained on the text. For each card the pass and the recomputation are chosen as `auto`
chooses them, unless the config names them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.falcon_7b_shape import write_tokenizer
from benchmarks.options import command_of, parser_of, told
from benchmarks.profiles import ROOT, script
from benchmarks.shapes import config_of
from kestrel.errors import KestrelError

SHAPE_OF = {
    "qwen2.5-7b-instruct": "qwen2.5-7b",
    "llama-3.1-8b-instruct": "llama-3.1-8b",
    "mistral-7b-v0.3": "mistral-7b",
    "falcon-7b-t4": "falcon-7b",
}
CARDS = ("8GB", "12GB", "16GB", "24GB", "80GB")
_FOUND = {
    "peak_gib": r"peak of all tensors\s+([\d.]+)",
    "fits": r"GPU memory \(named\): (it fits|.*?)\s",
    "recompute": r"training.recompute: (\w+)",
    "tokens": r"kept for the backward pass of (.*?) tokens",
}


def write_tokenized_shape(folder: Path, shape: str, tokenizer: Path, text: Path) -> None:
    """A model folder without weights, with a tokenizer of another where its vocabulary holds that, else one of the text."""
    from transformers import AutoTokenizer

    config = config_of(shape)
    config.save_pretrained(folder)
    if len(AutoTokenizer.from_pretrained(tokenizer)) > config.vocab_size:
        write_tokenizer(folder, text.read_text(encoding="utf-8").splitlines())
        return
    for pattern in ("*token*", "*.jinja"):
        for file in tokenizer.glob(pattern):
            shutil.copy(file, folder)


def dry_run(argv: list[str]) -> dict[str, Any]:
    """What the dry run prints, by `_FOUND`; `fits` is false where it says that the card is too small."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = script("train").main([*argv, "--dry-run"])
    text = printed.getvalue()
    found = {name: match[1] for name, pattern in _FOUND.items() if (match := re.search(pattern, text))}
    return {
        "fits": status == 0 and "it fits" in text,
        "peak_gib": float(found["peak_gib"]) if "peak_gib" in found else None,
        "recompute": found.get("recompute"),
        "tokens": found.get("tokens"),
    }


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--configs", nargs="+", choices=SHAPE_OF, default=list(SHAPE_OF))
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args(argv)
    return told(lambda: measure(options, command_of("cards.py", argv)))


def measure(options: argparse.Namespace, command: str) -> int:
    """Raises:
    KestrelError: preprocess.py failed; it has said why.
    """
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import git_commit, library_versions

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for config in options.configs:
            folder = Path(temporary) / config
            folder.mkdir()
            write_tokenized_shape(folder, SHAPE_OF[config], options.tokenizer, Path(options.text))
            common = ["--config", str(ROOT / "configs" / f"{config}.yaml"), "--run_dir", str(folder / "run")]
            common += ["--data.source", options.text, "--model.name", str(folder)]
            if script("preprocess").main(common):
                raise KestrelError(f"preprocess.py failed for {config}")
            for card in ("13GiB",) if config.endswith("t4") else CARDS:
                rows.append({"config": config, "card": card, **dry_run([*common, "--training.device_memory", card])})
                print(rows[-1], flush=True)
    if options.output:
        record = {"command": command, "versions": library_versions(), "commit": git_commit(), "rows": rows}
        write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
