"""Kestrel: LoRA fine-tuning of causal language models on persona dialogue, with proofs."""

import logging
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_BY_A_SCRIPT = Path(sys.argv[0] if sys.argv else "").resolve().parent == Path(__file__).resolve().parents[1]

# Python would answer a Ctrl-C during a script's own imports with a traceback; the system ends it in silence. Once the
# script runs, `process.on_signals` takes over.
if _BY_A_SCRIPT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def not_installed(package: str) -> str:
    """What to do where a package is missing, mostly because `python` is another one than that of the environment."""
    return (
        f"the package {package} is not installed for {sys.executable}; use the environment that make has made, "
        f".venv/bin/python, or: {sys.executable} -m pip install -r requirements.txt"
    )


# What the scripts import before they can say anything themselves.
if _BY_A_SCRIPT:
    for _package in ("pydantic", "yaml"):
        if find_spec(_package) is None:
            sys.exit(f"{Path(sys.argv[0]).name}: {not_installed(_package)}")

# bitsandbytes (0.50) warns at its import, on CPUs with AVX512-BF16, that a package is missing for the repacking of weights
# that `quantization.forbid_repacking` forbids. Whoever imports it first, this file was read before.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
