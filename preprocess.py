"""Turns persona dialogues into training sequences.

    python preprocess.py --config configs/falcon-7b.yaml
    python preprocess.py --config configs/falcon-7b.yaml --show 3      also show dialogues as the model sees them

Reads data.source, cuts the splits it lacks, renders each dialogue as one token sequence in which the
owner's replies are supervised, and writes RUN/dataset with a manifest and statistics.
"""

from __future__ import annotations

import kestrel.interrupts  # noqa: F401  before all others: from here on Ctrl-C is quiet

import argparse
import atexit
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.config.settings import Settings
    from kestrel.data.corpus import Corpus
    from kestrel.prompt.prompt import Prompt


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of dialogues, 0 or more, found {text!r}")
    return int(text)


OPTIONS = [("--show", {"type": _count, "default": 0, "metavar": "N", "help": "print the first N training dialogues"})]
UNUSED = {"data.dataset": "a run with another's data set needs no preprocess.py; run train.py, or leave this out"}


def preprocess(settings: Settings, options: argparse.Namespace) -> None:
    from kestrel.data.corpus import open_corpus
    from kestrel.data.dataset import load_split, print_rows
    from kestrel.model.defaults import check_vocabulary
    from kestrel.prompt.load import load_prompt
    from kestrel.runtime.atomic import folder_atomically
    from kestrel.runtime.disk_space import dataset_bytes, room_for

    data = settings.data
    prompt = load_prompt(settings)
    check_vocabulary(settings.model, prompt)
    for note in prompt.notes:
        print(f"note: {note}")
    # The libraries' half a million objects stay: searching them for garbage again and again would double the time. At the
    # end of the process they must be found again: nanobind (2.13, in Triton) would list all of its own as leaked.
    gc.freeze()
    atexit.register(gc.unfreeze)
    target = Path(settings.run_dir) / "dataset"
    corpus = open_corpus(data)
    print(f"{data.source} is {corpus.format}, with {', '.join(corpus.splits)}")
    needed = dataset_bytes(corpus.paths, data.max_dialogues)
    with room_for("the dataset's files", needed, target.parent), folder_atomically(target) as folder:
        report = _write_dataset(folder, settings, corpus, prompt)
    print(f"{report}\n\nwrote {target}")
    if options.show:
        print_rows(load_split(target, "train", ""), prompt, options.show)


def _write_dataset(folder: Path, settings: Settings, corpus: Corpus, prompt: Prompt) -> str:
    """Writes splits, statistics and manifest; returns the report for the terminal."""
    from tqdm import tqdm

    from kestrel.data import report
    from kestrel.data.dataset import settings_that_shape, write_split
    from kestrel.data.read_counts import ReadCounts, reasons
    from kestrel.data.splits import Splitter
    from kestrel.errors import KestrelError
    from kestrel.runtime.atomic import write_json
    from kestrel.runtime.manifest import write_manifest

    data = settings.data
    fractions = (data.validation_fraction, data.test_fraction)
    splitter = Splitter(corpus, *fractions, settings.seed, data.max_dialogues, folder)
    if "validation" not in splitter.splits:
        used = splitter.origin.get("test") == "validation"
        lacks = "no test split, so that its validation split is the test set" if used else "no validation split"
        raise KestrelError(
            f"{data.source} has {lacks}, and with data.validation_fraction 0 no validation split is cut from train; "
            "training needs one, so set it to 0.05, for example"
        )
    counts = {split: ReadCounts() for split in splitter.splits}
    statistics = {}
    for split in splitter.splits:
        dialogues = tqdm(splitter.read(split, counts[split]), split, unit=" dialogues", disable=None, leave=False)
        statistics[split] = write_split(dialogues, prompt, folder / split)
        if not statistics[split].lengths:
            raise KestrelError(
                f"no dialogue of {data.source} is left for {split} ({reasons(statistics[split].dropped)}); "
                "raise prompt.max_length, or the split's fraction"
            )
    write_json(folder / "statistics.json", report.as_json(splitter, statistics, counts))
    write_manifest(
        folder,
        "dataset",
        settings_that_shape(settings),
        made_from={"source": corpus.fingerprint, "format": corpus.format},
        prompt=prompt.identity(),
        counts={split: each.replies for split, each in statistics.items()},
    )
    return report.as_text(splitter, statistics, counts, settings)


def main(argv: list[str] | None = None) -> int:
    return run_script("preprocess.py", __doc__, preprocess, argv, OPTIONS, unused=UNUSED)


if __name__ == "__main__":
    sys.exit(main())
