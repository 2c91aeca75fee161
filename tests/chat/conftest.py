"""chat.py over a pipe, and its page in a browser."""

from __future__ import annotations

import io
import sys

import pytest
from browsers import chromium
from chat_page import AS_PERSONA, GREEDY, LONG, Page, Served

import chat


@pytest.fixture
def talk(trained, monkeypatch, capsys):
    """Types lines into chat.py and returns what it printed."""

    def typed(*lines: str, more: list[str] | None = None, status: int = 0) -> str:
        stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")))
        monkeypatch.setattr(sys, "stdin", stdin)
        options = AS_PERSONA if more is None else more
        decides = any(option.startswith("--generation.") for option in options)
        assert chat.main(trained.arguments(*options, *([] if decides else GREEDY))) == status
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    return typed


@pytest.fixture(scope="session")
def temporary(tmp_path_factory):
    """The temporary folder of the served process."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="session")
def served(trained, temporary):
    with Served(trained.arguments(*LONG), TMPDIR=str(temporary)) as server:
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    with chromium(**{"download.default_directory": str(folder), "download.prompt_for_download": False}) as chrome:
        chrome.downloads = folder
        yield chrome


@pytest.fixture
def page(browser, served):
    return Page(browser, served.url)
