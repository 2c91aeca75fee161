"""An experiment of the tests: a config and what it names."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Experiment:
    """A config and what it names."""

    config: Path
    run: Path
    base: Path
    source: Path

    def arguments(self, *more: str) -> list[str]:
        return ["--config", str(self.config), *more]

    def copy_to(self, run: Path) -> list[str]:
        """Arguments for the same experiment in another run folder, which begins as a copy of this one."""
        shutil.copytree(self.run, run)
        return self.arguments("--run_dir", str(run))
