"""Kestrel: LoRA fine-tuning of causal language models on persona dialogue, with proofs."""

import logging
import signal
import sys
from pathlib import Path

__version__ = "0.1.0"

# Python would answer a Ctrl-C during a script's own imports with a traceback; the system ends it in silence. Once the
# script runs, `process.on_signals` takes over.
if (
    Path(sys.argv[0] if sys.argv else "").resolve().parent == Path(__file__).resolve().parents[1]
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# bitsandbytes (0.50) warns at its import, on CPUs with AVX512-BF16, that a package is missing for the repacking of weights
# that `quantization.forbid_repacking` forbids. Whoever imports it first, this file was read before.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
