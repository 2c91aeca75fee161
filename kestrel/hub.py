"""The Hugging Face Hub's client: whether the Hub can be reached, and the client's errors in plain words.

Tokens are the client's business (huggingface_hub reads HF_TOKEN or the login); none passes through this project.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kestrel.errors import KestrelError

SILENCE = 60.0  # seconds in which nothing of a request moves, where the client sets no limit
_silences: list[float] = []  # when requests ended without an answer, since the last answer
_POINTER, _LONGEST_POINTER = b"version https://git-lfs", 1024  # bytes


@contextmanager
def plain_hub_errors(what: str, without_network: str = "") -> Iterator[None]:
    """Turns the client's errors into one sentence that says what was looked for (`what`) and what to do.

    Args:
        without_network: what else to do where the Hub cannot be reached.
    """
    from huggingface_hub import errors

    _bound_waiting()
    absent = "the Hub cannot be reached, and the client's cache does not have it"
    silent = "the Hub stopped answering; run the same command again"
    if _network_is_forbidden():
        silent = absent = "HF_HUB_OFFLINE forbids the network, and the client's cache does not have it; unset it"
    sentences: dict[type[Exception], str] = {  # subclasses come first
        errors.OfflineModeIsEnabled: silent,
        errors.LocalEntryNotFoundError: absent,
        errors.IncompleteSnapshotError: absent,
        errors.GatedRepoError: "access is restricted; ask for it on the Hub and log in: hf auth login",
        errors.RepositoryNotFoundError: "the Hub knows no such repository, or it is private and you are not logged in "
        "(HF_TOKEN, or: hf auth login)",
        errors.EntryNotFoundError: "the repository lacks a file ({}); it is not what it should be",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.LocalTokenNotFoundError: "no token; set HF_TOKEN or log in: hf auth login",
        errors.HfHubHTTPError: "the Hub refused ({}); ",
    }
    advice = {
        400: "fix what it names",
        401: "the token is missing or wrong; set HF_TOKEN or log in: hf auth login",
        403: "the token may not read or not write there; make one with access to this repository",
        429: "the Hub asks to slow down; wait and run the same command again",
    }
    try:
        yield
    except tuple(sentences) as caught:
        # The client says that a file is in no cache, also where the Hub's answer was another than the file.
        refused = isinstance(caught, errors.LocalEntryNotFoundError) and isinstance(
            caught.__cause__, errors.HfHubHTTPError
        )
        error = caught.__cause__ if refused and caught.__cause__ else caught
        kind = next(kind for kind in sentences if isinstance(error, kind))
        sentence = sentences[kind].format(first_line(error))
        if sentence == absent:
            sentence += without_network
        if kind is errors.HfHubHTTPError:
            status = getattr(getattr(error, "response", None), "status_code", None)
            sentence += advice.get(status or 0, "run the same command again")
        raise KestrelError(f"{what}: {sentence}") from None
    except _broken_connections() as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise KestrelError(f"{what}: {silent}") from None
        failed = f"the connection failed ({first_line(error.__cause__ or error)})"
        raise KestrelError(f"{what}: {failed}; run the same command again, what arrived is kept") from None


@contextmanager
def plain_full_cache() -> Iterator[None]:
    """Turns the error of a full disk into a sentence that says which disk it is."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Not enough free disk space")
            yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise KestrelError(_full_cache()) from None


def _is_full(error: Exception) -> bool:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    # Libraries in Rust raise other types than OSError.
    return full or "No space left" in str(error) or "quota exceeded" in str(error)


def _full_cache() -> str:
    from huggingface_hub import constants

    return (
        f"the disk with the Hub's cache, {constants.HF_HUB_CACHE}, is full; free some space and run the same command "
        "again, or set HF_HOME to a folder on another disk"
    )


@functools.cache
def _bound_waiting() -> None:
    """Lets requests end that nobody answers. The client (huggingface_hub 2.4) would wait for ever for some, and for others
    six times a minute for each file."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    if hasattr(_http, "default_client_factory"):  # absent before huggingface_hub 1

        def client() -> Any:
            made: Any = _http.default_client_factory()
            made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], _limit_silence]}
            made.send = _falling_back_to_the_cache(made.send)
            return made

        huggingface_hub.set_client_factory(client)


def _limit_silence(request: Any) -> None:
    limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
    request.extensions["timeout"] = {name: seconds or SILENCE for name, seconds in limits.items()}


def _falling_back_to_the_cache(send: Callable[..., Any]) -> Callable[..., Any]:
    """A client's `send` that leaves the client to its cache once two requests in a row were not answered."""

    def send_or_fall_back(request: Any, **how: Any) -> Any:
        began = time.monotonic()
        try:
            answer = send(request, **how)
        except _timeouts():
            if any(began >= ended for ended in _silences):
                _use_cache(f"{request.url.scheme}://{request.url.netloc.decode()} does not answer")
            _silences.append(time.monotonic())
            raise
        _silences.clear()
        return answer

    return send_or_fall_back


def _network_is_forbidden() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")


def _http_libraries() -> list[Any]:
    """The client's: httpx up to huggingface_hub 1, httpx2 since 2."""
    return [importlib.import_module(name) for name in ("httpx", "httpx2") if find_spec(name)]


def _timeouts() -> tuple[type[Exception], ...]:
    return tuple(library.TimeoutException for library in _http_libraries())


def _broken_connections() -> tuple[type[Exception], ...]:
    """What a lost connection raises: errors of the HTTP library, or wrapped ones."""
    return (ConnectionError, RuntimeError, *(library.HTTPError for library in _http_libraries()))


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@functools.cache
def use_cache_without_network() -> None:
    """Switches the Hub's client to its cache if the Hub does not answer, and says so. Asks once in a process.

    The client (huggingface_hub 2.4) would try each file six times, half a minute, and warn of each.
    """
    from huggingface_hub import constants

    _bound_waiting()
    if not _uses_cache() and (reason := _silent(constants.ENDPOINT)):
        _use_cache(f"{constants.ENDPOINT} cannot be reached ({reason})")


def _uses_cache() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _use_cache(why: str) -> None:
    from huggingface_hub import constants

    if not _uses_cache():
        constants.HF_HUB_OFFLINE = True
        print(f"{why}: only the Hub's cache on this machine is used", file=sys.stderr)


def _silent(url: str) -> str | None:
    """Why nobody answers at a URL; None if somebody does, whatever the answer."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5.0).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        # A refused certificate is an answer too: the client has certificates of its own.
        certificate = "certificate" in str(reason).lower()
        return None if certificate else str(getattr(reason, "strerror", None) or reason)
    return None


def refuse_pointers(folder: Path, key: str) -> None:
    """Refuses a folder that was cloned without Git LFS, where small files of text stand for the large ones.

    Raises:
        KestrelError: naming one of them, and the command that fetches them.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_file() and path.stat().st_size < _LONGEST_POINTER:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise KestrelError(
                        f"{key} {folder}: {path.name} is a Git LFS pointer, not the file itself; fetch the files with: "
                        f"cd {shlex.quote(str(folder))} && git lfs pull"
                    )


@contextmanager
def plain_loading_errors(what: str, name: str, key: str = "model.name") -> Iterator[None]:
    """Turns the libraries' many errors for a missing or unreachable model into one sentence."""
    from safetensors import SafetensorError

    is_local = Path(name).exists()
    if not is_local:
        use_cache_without_network()
    try:
        yield
    except Exception as error:  # some are of libraries that are not imported before they are needed
        kinds: tuple[type[Exception], ...] = (
            OSError, ValueError, KeyError, ImportError, SafetensorError, *_broken_connections()
        )  # fmt: skip
        # tokenizers (0.23) raises a bare Exception for a file that it cannot read. OutOfMemoryError is torch's, which need not have
        # been imported, and a RuntimeError.
        if not (isinstance(error, kinds) or type(error) is Exception) or type(error).__name__ == "OutOfMemoryError":
            raise
        if _is_full(error) and not is_local:
            advice = _full_cache()
        elif "custom code" in str(error):
            advice = "it comes with Python code of its own; read that, then set model.trust_remote_code: true"
        elif "tiktoken" in str(error).lower() or "sentencepiece" in str(error).lower():
            advice = "a library that reads its kind of tokenizer is missing: pip install sentencepiece tiktoken"
        elif is_local:
            advice = "the folder exists but cannot be used"
        elif _network_is_forbidden():
            advice = "it is no local folder and HF_HUB_OFFLINE forbids the network"
        elif _uses_cache():
            advice = (
                "it is no local folder, and the Hub, which does not answer, is needed for what its cache here lacks"
            )
        else:
            advice = "it is no local folder; as a Hub id it needs the network, and a token if it is gated"
        raise KestrelError(f"cannot load the {what} of {key} {name!r}: {advice} ({first_line(error)})") from error
