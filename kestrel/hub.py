"""The Hugging Face Hub's client: whether the Hub can be reached, and the client's errors in plain words.

Tokens are the client's business (huggingface_hub reads HF_TOKEN or the login); none passes through this project.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from kestrel.errors import KestrelError

_PATIENCE = 5.0  # seconds


@contextmanager
def plain_hub_errors(what: str) -> Iterator[None]:
    """Turns the client's errors into one sentence that says what to do.

    Args:
        what: is looked for, and with what else it was looked for before.
    """
    from huggingface_hub import errors

    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
            raise KestrelError(
                f"{what}: HF_HUB_OFFLINE forbids the network, and the client's cache has it not; unset it"
            ) from None
        raise KestrelError(f"{what}: the Hub cannot be reached, and the client's cache has it not") from None
    except errors.GatedRepoError:
        raise KestrelError(f"{what}: access is restricted; ask for it on the Hub and log in: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise KestrelError(
            f"{what}: the Hub knows no such repository, or it is private and you are not logged in (HF_TOKEN, or: "
            "hf auth login)"
        ) from None
    except errors.EntryNotFoundError as error:
        raise KestrelError(
            f"{what}: the repository lacks a file ({_first_line(error)}); it is not what it should be"
        ) from None
    except errors.RevisionNotFoundError:
        raise KestrelError(f"{what}: the repository has no such revision") from None
    except errors.LocalTokenNotFoundError:
        raise KestrelError(f"{what}: no token; set HF_TOKEN or log in: hf auth login") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = {
            401: "the token is missing or wrong; set HF_TOKEN or log in: hf auth login",
            403: "the token may not write there; make one with write access to this repository",
            429: "the Hub asks to slow down; wait and run the same command again",
        }.get(status or 0, "run the same command again" if status != 400 else "mend what it names")
        raise KestrelError(f"{what}: the Hub refused ({_first_line(error)}); {advice}") from None
    except _broken_connections() as error:
        cause = error.__cause__ or error
        raise KestrelError(
            f"{what}: the connection failed ({_first_line(cause)}); run the same command again, what arrived is kept"
        ) from None


def _broken_connections() -> tuple[type[Exception], ...]:
    """What a lost connection raises: errors of httpx up to huggingface_hub 1, of httpx2 since 2, or wrapped ones."""
    libraries = [importlib.import_module(name) for name in ("httpx", "httpx2") if find_spec(name)]
    return (ConnectionError, RuntimeError, *(library.HTTPError for library in libraries))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


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


@contextmanager
def plain_loading_errors(what: str, name: str) -> Iterator[None]:
    """Turns the libraries' many errors for a missing or unreachable model into one sentence."""
    from safetensors import SafetensorError

    if not Path(name).exists():
        use_cache_without_network()
    try:
        yield
    except KestrelError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not have been imported
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(name).exists():
            advice = "the folder exists but cannot be used"
        elif os.environ.get("HF_HUB_OFFLINE") == "1":
            advice = "it is no local folder and HF_HUB_OFFLINE=1 forbids the network"
        else:
            advice = "it is no local folder; as a Hub id it needs the network, and a token if it is gated"
        raise KestrelError(f"cannot load the {what} of model.name {name!r}: {advice} ({first})") from error
