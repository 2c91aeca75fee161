"""Scores generations: BLEU, ROUGE-L, F1, perplexity and more, with intervals, beside systems that need no model.

    python evaluate.py --config configs/quickstart.yaml
    python evaluate.py --config configs/quickstart.yaml --evaluation.generations mine.jsonl theirs.jsonl

Reads generations/SPLIT.SYSTEM.jsonl of the run, or the files named: one JSON object per line with `reference` and
`response`, and optionally dialogue_id, turn, persona, history, stopped_by, response_tokens, reference_nll,
reference_tokens, candidate_nll. SYSTEM-seedN and SYSTEM-orderK are further seeds of SYSTEM and further orders of the
persona; the spread of their scores is shown. Needs no model and no GPU. Writes evaluation/ in the run folder:
metrics.json, report.html, report.md, plots, and every system's responses as text for other tools.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.config.settings import Settings


def steps(settings: Settings, arguments: argparse.Namespace) -> None:
    from kestrel.adapter.source import find_local_adapter
    from kestrel.evaluation.alignment import align
    from kestrel.evaluation.evaluate_library import extra_scores, load_metrics
    from kestrel.evaluation.generations import read_generations
    from kestrel.evaluation.provenance import check_provenance
    from kestrel.evaluation.report import write_report
    from kestrel.evaluation.scoring import evaluate_files, write_responses
    from kestrel.evaluation.tables import summary
    from kestrel.evaluation.trivial_systems import replies_of_other_split
    from kestrel.runtime.atomic import folder_atomically, write_json
    from kestrel.runtime.disk_space import evaluation_bytes, room_for

    options = settings.evaluation
    run_dir = Path(settings.run_dir)
    extra_metrics = load_metrics(options.extra_metrics)
    paths = generation_files(settings)
    if not options.generations:
        adapter = find_local_adapter(settings.model.adapter) if settings.model.adapter else run_dir / "adapter"
        if adapter is None:
            print(
                f"note: {settings.model.adapter} is not on this machine, so whether it made these is not checked",
                file=sys.stderr,
            )
        check_provenance(run_dir, adapter, paths, f"python generate.py {arguments.again}")
    files, notes = align([read_generations(path) for path in paths])

    split = next((file.split for file in files if file.split), None)
    dialogue_ids = {reply.dialogue_id for reply in files[0].replies}
    search, source = replies_of_other_split(run_dir, split, dialogue_ids)
    if search:
        notes.append(f"The constant systems are searched in the run's {source} split.")
    elif len(dialogue_ids) > 1:
        notes.append(f"The constant systems are searched by halves of the scored dialogues, because {source}.")
    evaluation = evaluate_files(files, notes, options, settings.seed, search)
    if extra_metrics:
        for system, texts in evaluation.texts().items():
            evaluation.metrics["systems"][system]["extra"] = extra_scores(extra_metrics, texts)

    folder = run_dir / "evaluation"
    needed = evaluation_bytes([file.path for file in files])
    with room_for("scores and report", needed, run_dir), folder_atomically(folder) as unfinished:
        write_json(unfinished / "metrics.json", evaluation.metrics)
        write_responses(unfinished / "responses", evaluation)
        write_report(unfinished, evaluation, run_dir / "logs" / "training.jsonl", options.samples, settings.seed)
    print(summary(evaluation.metrics))
    print(f"\n{folder}/report.html shows everything; {folder}/metrics.json has the numbers")


def generation_files(settings: Settings) -> list[Path]:
    """The files to score: those named, else all of the run's for generation.split."""
    from kestrel.errors import KestrelError

    if settings.evaluation.generations:
        return [Path(name) for name in settings.evaluation.generations]
    folder = Path(settings.run_dir) / "generations"
    files = sorted(folder.glob(f"{settings.generation.split}.*.jsonl"))
    if not files:
        raise KestrelError(
            f"{folder} has no generations of split {settings.generation.split}; run generate.py first, or name files "
            "with --evaluation.generations"
        )
    return files


def main(argv: list[str] | None = None) -> int:
    return run_script("evaluate.py", __doc__, steps, argv)


if __name__ == "__main__":
    sys.exit(main())
