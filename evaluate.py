"""Scores generations: BLEU, ROUGE-L, F1, perplexity and more, with intervals, beside systems that need no model.

    python evaluate.py --config configs/quickstart.yaml
    python evaluate.py --evaluation.generations mine.jsonl theirs.jsonl
    python evaluate.py --config configs/quickstart.yaml --evaluation.compare runs/a runs/b

Reads generations/SPLIT.SYSTEM.jsonl of the run, or the files named: one JSON object per line with `reference` and
`response`, and optionally dialogue_id, turn, persona, history, stopped_by, response_tokens, reference_nll,
reference_tokens, candidate_nll; docs/metrics.md lists the other forms. SYSTEM-seedN and SYSTEM-orderK are further seeds
of SYSTEM and further orders of the persona; the spread of their scores is shown. Needs no model and no GPU. Writes
metrics.json, report.html, report.md, plots, and every system's responses as text for other tools: to evaluation/ in the
run folder, to comparison/ where runs are compared, or, of files that are named, to a folder beside it with their names.
Without --config, that lies beside the first file.
"""

from __future__ import annotations

import kestrel.interrupts  # noqa: F401  before all others: from here on Ctrl-C is quiet

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kestrel.runtime.command_line import run_script

if TYPE_CHECKING:
    from kestrel.config.settings import Settings


def steps(settings: Settings, arguments: argparse.Namespace) -> None:
    from kestrel.evaluation.alignment import align
    from kestrel.evaluation.conventions import add_conventions, conventions
    from kestrel.evaluation.evaluate_library import extra_scores, load_metrics
    from kestrel.evaluation.generations import read_generations
    from kestrel.evaluation.judgements import in_words, judged, read_judgements, read_key
    from kestrel.evaluation.provenance import difference_notes
    from kestrel.evaluation.report import write_report
    from kestrel.evaluation.run_files import files_to_score, output_folder, runs_of
    from kestrel.evaluation.scoring import evaluate_files, write_responses
    from kestrel.evaluation.sheet import write_sheet
    from kestrel.evaluation.tables import print_summary
    from kestrel.evaluation.trivial_systems import replies_of_other_split
    from kestrel.runtime.atomic import folder_atomically, write_json
    from kestrel.runtime.disk_space import evaluation_bytes, room_for
    from kestrel.runtime.manifest import with_own_hash

    options = settings.evaluation
    nli = None
    if options.nli:  # which needs torch, as nothing else here does
        from kestrel.evaluation.consistency import NliModel

        nli = NliModel(options.nli)
    extra_metrics = load_metrics(options.extra_metrics)
    definitions = conventions(options.conventions, settings.hub.language[0] if settings.hub.language else "en")
    paths = files_to_score(settings, arguments.again)
    run_dir = Path(settings.run_dir) if arguments.config else paths[0].parent
    folder = output_folder(settings, run_dir, paths)
    files, notes = align([read_generations(path, options.fields) for path in paths])

    split = next((file.split for file in files if file.split), None)
    dialogue_ids = {reply.dialogue_id for reply in files[0].replies}
    run = runs_of(settings)[0] if arguments.config else None  # else the present folder is no run, whatever it holds
    search, source = replies_of_other_split(run, split, dialogue_ids)
    if search:
        notes.append(f"The constant systems are searched in the run's {source} split.")
    elif len(dialogue_ids) > 1:
        notes.append(f"The constant systems are searched by halves of the scored dialogues, because {source}.")
    evaluation = evaluate_files(files, [*notes, *difference_notes(files)], options, settings.seed, search, nli)
    add_conventions(evaluation, definitions)
    if extra_metrics:
        for name, system in evaluation.systems.items():
            evaluation.metrics["systems"][name]["extra"] = extra_scores(extra_metrics, evaluation.texts(system))

    if options.judgements:
        key = read_key(run_dir / "sheet")
        votes = read_judgements([Path(name) for name in options.judgements], key)
        found = evaluation.metrics["judgements"] = judged(evaluation, key, votes)
        evaluation.metrics["verdicts"].append(in_words(found))
    if options.sheet:
        print(write_sheet(run_dir / "sheet", evaluation, options.sheet, settings.seed))

    needed = evaluation_bytes([file.path for file in files])
    with room_for("scores and report", needed, folder.parent), folder_atomically(folder) as unfinished:
        write_json(unfinished / "metrics.json", with_own_hash(evaluation.metrics))
        write_responses(unfinished / "responses", evaluation)
        log = None if options.compare or options.generations else run_dir / "logs" / "training.jsonl"
        write_report(unfinished, evaluation, log, options.samples, settings.seed)
    print_summary(evaluation.metrics)
    print(f"\n{folder}/report.html shows everything; {folder}/metrics.json has the numbers")


def main(argv: list[str] | None = None) -> int:
    # Files of any tool can be scored without an experiment: nothing but these names is then taken from one.
    without_config = {"run_dir": ".", "data": {"source": "none"}, "model": {"name": "none"}}
    return run_script("evaluate.py", __doc__, steps, argv, presets={"evaluation.generations": without_config})


if __name__ == "__main__":
    sys.exit(main())
