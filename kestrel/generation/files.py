"""Files of generations: their names, what generations/manifest.json records of each, and which are up to date.

Nothing heavy is imported, so evaluate.py can ask too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kestrel.config.settings import Settings
from kestrel.dialogue import SPLITS
from kestrel.errors import KestrelError
from kestrel.runtime.manifest import MANIFEST, identity_of, read_manifest, sha256_of, write_manifest

_WITH_ORDER = re.compile(r"(?P<system>.+)-order(?P<order>[1-9][0-9]*)", re.DOTALL)


def name_in_order(system: str, order: int) -> str:
    """A system's name in the name of its file: SYSTEM, or SYSTEM-orderK where the persona is shuffled."""
    return f"{system}-order{order}" if order else system


def order_in_name(name: str) -> tuple[str, int]:
    """System and order of a name that `name_in_order` made."""
    match = _WITH_ORDER.fullmatch(name)
    return (match["system"], int(match["order"])) if match else (name, 0)


def split_and_system(path: Path) -> tuple[str | None, str]:
    """Split and system of a file: SPLIT.SYSTEM.jsonl, else no split and the name without its ending."""
    stem = re.sub(r"(\.hyp)?\.txt$|\.hyp$|\.jsonl?$", "", path.name)
    split, dot, system = stem.partition(".")
    return (split, system) if dot and system and split in SPLITS else (None, stem)


def recorded_files(folder: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """What generations/manifest.json records of each file: its sha256, and what it was made from.

    Args:
        folder: RUN/generations.
        remedy: what to do about a damaged manifest, for the message.

    Raises:
        KestrelError: missing or damaged.
    """
    recorded = read_manifest(folder, "generations", remedy, check_files=False).get("generations", {})
    if not isinstance(recorded, dict) or not all(
        isinstance(facts, dict) and isinstance(facts.get("sha256"), str) and isinstance(facts.get("made_from"), dict)
        for facts in recorded.values()
    ):
        raise KestrelError(f"{folder / MANIFEST} is damaged (generations); {remedy}")
    return recorded


def _recorded_so_far(folder: Path) -> dict[str, dict[str, Any]]:
    """As `recorded_files`; empty where nothing was generated yet."""
    if not (folder / MANIFEST).exists():
        return {}
    return recorded_files(folder, f"delete {folder} and run this again")


@dataclass(frozen=True)
class GenerationsFile:
    """One file of answers.

    Attributes:
        path: RUN/generations/SPLIT.SYSTEM.jsonl or SPLIT.SYSTEM-orderK.jsonl.
        system: adapter or base.
        order: of the persona's sentences; 0 as given.
        made_from: all that decides the answers.
    """

    path: Path
    system: str
    order: int
    made_from: dict[str, Any]

    @property
    def label(self) -> str:
        return name_in_order(self.system, self.order)

    def is_up_to_date(self) -> bool:
        """Whether the file is as it was recorded, and is what this call would make."""
        facts = _recorded_so_far(self.path.parent).get(self.path.name)
        if facts is None or not self.path.exists():
            return False
        return facts == {"sha256": sha256_of(self.path), "made_from": self.made_from}

    def record(self, settings: Settings) -> None:
        """Adds the finished file to generations/manifest.json and keeps the entries of files that did not change."""
        folder = self.path.parent
        kept = {
            name: facts
            for name, facts in _recorded_so_far(folder).items()
            if (folder / name).exists() and sha256_of(folder / name) == facts["sha256"]
        }
        write_manifest(
            folder,
            "generations",
            settings={"generation": settings.generation.model_dump(), "seed": settings.seed},
            made_from={},
            generations={**kept, self.path.name: {"sha256": sha256_of(self.path), "made_from": self.made_from}},
        )


def what_decides(settings: Settings, dataset: str, base: dict[str, Any], prompt_sha256: str) -> dict[str, Any]:
    """What decides the answers of every system, whatever the order of the persona.

    Args:
        dataset, prompt_sha256: identities.
        base: from `base_identity`.
    """
    # How many prompts share a batch changes only speed, unless the library samples: it draws for a whole batch.
    left_out = {"systems", "persona_orders"} | (set() if settings.generation.do_sample else {"tokens_per_step"})
    if not settings.generation.other_personas:  # so that files of versions without this setting stay up to date
        left_out.add("other_personas")
    return {
        "dataset": dataset,
        "base": base,
        "prompt_sha256": prompt_sha256,
        "quantization": settings.quantization.model_dump(),
        "generation": settings.generation.model_dump(exclude=left_out),
        "seed": settings.seed,
    }


def files_to_make(settings: Settings, common: dict[str, Any], adapter: dict[str, Any] | None) -> list[GenerationsFile]:
    """The files that the settings ask for.

    Args:
        common: from `what_decides`.
        adapter: the adapter's manifest; None where it does not answer.
    """
    chosen, folder, files = settings.generation, Path(settings.run_dir) / "generations", []
    for order in range(chosen.persona_orders):
        for system in chosen.systems:
            made_from = {**common, "system": system}
            if system == "adapter" and adapter is not None:
                made_from["adapter"] = identity_of(adapter)
            if order:
                made_from["persona_order"] = order
            path = folder / f"{chosen.split}.{name_in_order(system, order)}.jsonl"
            files.append(GenerationsFile(path, system, order, made_from))
    return files
