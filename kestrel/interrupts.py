"""Ctrl-C while a script still imports: it ends without a traceback. Every script imports this module first.

`runtime.signals` takes over once there is something to clean up. A process that only imports a script is left alone.
"""

# Not `signal`, which takes milliseconds to import, in which Ctrl-C would print a traceback.
import _signal  # type: ignore[import-not-found]
import os
import sys


def _end(number: int, frame: object) -> None:
    os.write(2, b"interrupted; run the same command again to continue\n")
    os._exit(128 + number)


_main = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")
_is_ours = os.path.dirname(_main) == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _is_ours and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _end)
