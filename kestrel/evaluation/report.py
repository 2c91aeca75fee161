"""stub"""

from pathlib import Path

from kestrel.evaluation.scoring import Evaluation


def write_report(folder: Path, evaluation: Evaluation, log: Path, samples: int, seed: int) -> None:
    pass
