"""All dependencies, direct and indirect: their exact versions and their licences.

    python tools/dependencies.py lock > requirements.lock.txt        of the environment that runs this; see `make lock`
    python tools/dependencies.py licences > docs/licences.md         of the packages in the lock

The lock has no build of torch (`2.13.0`, not `2.13.0+cpu`), so that it serves machines with and without
a GPU. The packages that only torch's GPU builds need (nvidia-*, cuda-*, triton) are left out: torch itself pins them.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock.txt"
OF_TORCHS_BUILD = re.compile(r"(nvidia|cuda)[-_].*|triton|pytorch-triton.*")
OF_THE_ENVIRONMENT = {"pip", "wheel"}
# What only some Pythons need, as the lock has it, and its licence: `make lock` may run on another one.
OF_SOME_PYTHONS = {"audioop-lts": ('0.2.2; python_version >= "3.13"', "PSF-2.0")}  # of gradio (6.31)

_SPDX = {
    "Apache-2.0": r"apache",
    "MIT": r"\bmit\b",
    "BSD": r"\bbsd\b",
    "MPL-2.0": r"mozilla|\bmpl\b",
    "PSF-2.0": r"python software foundation|\bpsf",
    "ISC": r"\bisc",
    "LGPL": r"lesser general|\blgpl",
    "GPL": r"(?<!lesser )general public|\ba?gpl",
    "Unlicense": r"unlicense",
    "HPND": r"historical permission",
}


def canonical(name: str) -> str:
    """A package's normalized name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_locked(name: str) -> bool:
    """Whether a package belongs in the lock."""
    return name not in OF_THE_ENVIRONMENT and not OF_TORCHS_BUILD.fullmatch(name)


def pins(path: Path) -> dict[str, str]:
    """Package -> version of each `name==version` line of a requirements file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    matches = (re.fullmatch(r"([A-Za-z0-9._-]+)[=>]=([^\s;]+)(?:\s*;.*)?", line.strip()) for line in lines)
    return {canonical(match[1]): match[2] for match in matches if match}


def lock() -> str:
    """The packages installed here, as requirements."""
    versions = {canonical(each.metadata["Name"]): each.version.partition("+")[0] for each in metadata.distributions()}
    versions |= {name: version for name, (version, _) in OF_SOME_PYTHONS.items()}
    lines = [f"{name}=={version}" for name, version in sorted(versions.items()) if is_locked(name)]
    return "# The whole tree, for Python 3.11 to 3.14. Made by `make lock`; do not edit.\n" + "\n".join(lines) + "\n"


def licence_of(name: str) -> str:
    """A package's licence according to its metadata, as an SPDX identifier where possible, or UNKNOWN."""
    if name in OF_SOME_PYTHONS:
        return OF_SOME_PYTHONS[name][1]
    about = metadata.metadata(name)
    if "License-Expression" in about:
        return about["License-Expression"]
    classified = [line.rpartition("::")[2] for line in about.get_all("Classifier") or () if line.startswith("License")]
    stated = (about["License"] or "").splitlines()[:1] if "License" in about else []
    for texts in (classified, stated):
        text = " ".join(texts).lower()
        if matching := [spdx for spdx, words in _SPDX.items() if re.search(words, text)]:
            return ", ".join(matching)
    return "UNKNOWN"


def licences() -> str:
    """A page with every locked package, its version and its licence.

    Raises:
        SystemExit: a locked package is not installed, or its metadata names no known licence.
    """
    rows, unknown = [], []
    direct = pins(ROOT / "requirements.txt")
    for name, version in pins(LOCK).items():
        try:
            licence = licence_of(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed here; install requirements.lock.txt first")
        unknown += [name] if licence == "UNKNOWN" else []
        rows.append(f"| {name} | {version} | {licence} | {'the scripts' if name in direct else ''} |")
    if unknown:
        sys.exit(f"no licence found for {', '.join(unknown)}: look it up and add it to licence_of")
    return (
        "# Licences of the dependencies\n\nMade by `make licences` from the metadata of the packages that "
        "`requirements.lock.txt` names. None of them is part of this repository.\n\nOn a machine with an NVIDIA GPU, "
        "torch brings NVIDIA's libraries (nvidia-*, cuda-*) under NVIDIA's own licences, and triton under MIT.\n\n"
        "| package | version | licence | imported by |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:] not in (["lock"], ["licences"]):
        sys.exit(__doc__)
    print(lock() if sys.argv[1] == "lock" else licences(), end="")
