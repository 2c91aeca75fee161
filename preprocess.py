"""Turns persona dialogues into training sequences.

    python preprocess.py --config configs/falcon-7b.yaml
    python preprocess.py --config configs/falcon-7b.yaml --show 3      also show dialogues as the model sees them

Reads data.source, cuts the splits it lacks by persona, renders each dialogue as one token sequence in which the
owner's replies are supervised, and writes RUN/dataset with a manifest and statistics.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

from kestrel.config.settings import Settings
from kestrel.runtime.command_line import run_script


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of dialogues, 0 or more, found {text!r}")
    return int(text)


OPTIONS = [("--show", {"type": _count, "default": 0, "metavar": "N", "help": "print the first N training dialogues"})]


def preprocess(settings: Settings, options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from kestrel.data.corpus import Tally, open_corpus
    from kestrel.data.dataset import SplitStatistics, settings_that_shape, write_split, write_statistics
    from kestrel.data.splits import Splitter
    from kestrel.errors import KestrelError
    from kestrel.prompt.prompt import Prompt
    from kestrel.prompt.tokenizer import load_tokenizer
    from kestrel.runtime.atomic import folder_atomically
    from kestrel.runtime.disk_space import dataset_bytes, room_for
    from kestrel.runtime.manifest import write_manifest

    data = settings.data
    prompt = Prompt(load_tokenizer(settings.model), settings.prompt.format, settings.prompt.max_length)
    # The libraries' half a million objects stay: searched for garbage again and again, they would double the time.
    gc.freeze()
    target = Path(settings.run_dir) / "dataset"
    corpus = open_corpus(data.source, data.format, revision=data.revision, both_sides=data.both_sides)
    print(f"{data.source} is {corpus.format}, with {', '.join(corpus.splits)}")
    needed = dataset_bytes(corpus.files, data.max_dialogues)
    with room_for("the dataset's files", needed, target.parent), folder_atomically(target) as folder:
        splitter = Splitter(
            corpus,
            validation_fraction=data.validation_fraction,
            test_fraction=data.test_fraction,
            seed=settings.seed,
            max_dialogues=data.max_dialogues,
            folder=folder,
        )
        if "validation" not in splitter.splits:
            raise KestrelError(
                f"{data.source} has no validation split, and data.validation_fraction 0 cuts none off train; training "
                "needs one, so set it to 0.05, say"
            )
        statistics: dict[str, SplitStatistics] = {}
        tallies: dict[str, Tally] = {}
        for split in splitter.splits:
            tally = tallies[split] = Tally()
            dialogues = tqdm(splitter.read(split, tally), split, unit=" dialogues", disable=None, leave=False)
            statistics[split] = write_split(dialogues, prompt, folder / split)
            if not statistics[split].dialogues:
                raise KestrelError(
                    f"no dialogue of {data.source} is left for {split} ({statistics[split].why_dropped()}); "
                    "raise prompt.max_length, or the split's fraction"
                )
        described = write_statistics(
            folder,
            statistics,
            {
                split: {
                    "origin": splitter.origin[split],
                    "persona_overlap": splitter.persona_overlap.get(split),
                    "read": tallies[split].read,
                    "dropped": dict(tallies[split].dropped),
                    "repaired": dict(tallies[split].repaired),
                }
                for split in splitter.splits
            },
        )
        write_manifest(
            folder,
            "dataset",
            settings_that_shape(settings),
            made_from={"source": corpus.fingerprint, "format": corpus.format},
            prompt=prompt.identity(),
            counts={split: counts["replies"] for split, counts in described["splits"].items()},
        )
    print_statistics(described)
    for name, tally in tallies.items():
        if tally.dropped or tally.repaired:
            print(f"\nread for {name}:\n{tally.table()}")
    for name, personas in splitter.persona_overlap.items():
        if shared := personas["in_train"]:
            print(
                f"\n{shared:,} of the {personas['personas']:,} personas of {name} stand in train too, as the source has it"
            )
    print(f"\nwrote {target}")
    if options.show:
        show(target, prompt, options.show)


def print_statistics(described: dict[str, Any]) -> None:
    """One line a split: where it is from, how much there is, how long, how much is supervised, what was cut."""
    print(f"\n{'split':<11}{'dialogues':>10}{'replies':>9}{'tokens':>12}{'supervised':>12}", end="")
    print(f"{'median':>8}{'max':>7}{'turns cut':>11}  from")
    for split, counts in described["splits"].items():
        lengths, origin = counts["tokens_a_dialogue"], described["corpus"][split]["origin"]
        origin = origin if "cut" in origin else f"the source's {origin}"
        print(
            f"{split:<11}{counts['dialogues']:>10,}{counts['replies']:>9,}{counts['tokens']:>12,}"
            f"{counts['supervised_share']:>12.1%}{lengths['p50']:>8,}{lengths['max']:>7,}{counts['turns_cut']:>11,}  {origin}"
        )
        for reason, count in counts["dropped_at_rendering"].items():
            print(f"  {count:,} dropped: {reason}")


def show(folder: Path, prompt: Any, count: int) -> None:
    """Prints dialogues as they stand in the dataset, supervised tokens in green or in [brackets]."""
    from kestrel.data.arrow import first_rows

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    for row in first_rows(folder / "train", count):
        ids, labels = row["input_ids"], row["labels"]
        supervised = sum(label != -100 for label in labels)
        print(f"\n── {row['dialogue_id']}: {len(ids)} tokens, {supervised} supervised " + "─" * 20)
        start = 0
        while start < len(ids):
            end = start + 1
            while end < len(ids) and (labels[end] == -100) == (labels[start] == -100):
                end += 1
            text = prompt.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
            print(text if labels[start] == -100 else f"{before}{text}{after}", end="")
            start = end
        print()


def main(argv: list[str] | None = None) -> int:
    return run_script("preprocess.py", __doc__, preprocess, argv, OPTIONS)


if __name__ == "__main__":
    sys.exit(main())
