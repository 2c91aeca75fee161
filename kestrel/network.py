"""Whether the Hugging Face Hub can be reached, found out in seconds instead of minutes."""

from __future__ import annotations

import functools
import sys
import urllib.error
import urllib.request

_PATIENCE = 5.0  # seconds


@functools.cache
def use_cache_without_network() -> None:
    """Switches the Hub's client to its cache where the Hub does not answer, and says so; asked once in a process.

    The client (huggingface_hub 2.4) would try each file six times, half a minute, and warn of each.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and (reason := _silent(constants.ENDPOINT)):
        constants.HF_HUB_OFFLINE = True
        print(f"{constants.ENDPOINT} cannot be reached ({reason}): only its cache is used", file=sys.stderr)


def _silent(url: str) -> str | None:
    """Why nobody answers at a URL; None if somebody does, whatever the answer."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # A refused certificate is an answer too: the client has certificates of its own.
        certificate = "certificate" in str(error.reason).lower()
        return None if certificate else str(getattr(error.reason, "strerror", None) or error.reason)
    except OSError as error:
        return str(error)
    return None
