"""What a Hub of the tests holds, what was asked of it, and how it is to fail; `hub_server.py` answers for it."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

TOKEN = "hf_LoopbackLoopbackLoopback0000000000"
USER = "tester"


@dataclass
class Repository:
    """Files of each commit, by commit, oldest first."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        content = json.dumps([len(self.commits), sorted((name, git_oid(data)) for name, data in files.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        return oid


@dataclass
class Fault:
    """What happens to requests on a bad day.

    Attributes:
        requests: a pattern of them, such as "PUT /lfs".
        how: drop, truncate, stall, redirect (to another host), or the status that they get.
        times: so many of the next ones; 0 when the day is over.
    """

    requests: str
    how: str | int
    times: int = 10**6


@dataclass
class Hub:
    """What is on the Hub, what was asked of it, and how it fails."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)  # ids
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    uploaded: list[str] = field(default_factory=list)  # sha256 of each large file that arrived, in order
    requests: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # requests that the real Hub would not understand
    dropped_uploads: int = 0  # so many of the next uploads are cut off in the middle
    failing_commits: int = 0  # so many of the next commits fail on the Hub's side
    refused_metadata: str = ""  # what the check of a card's metadata finds wrong
    faults: list[Fault] = field(default_factory=list)
    stalled: bool = False  # large files wait while this is set
    waiting: threading.Event = field(default_factory=threading.Event)  # set as soon as one waits

    def add(self, name: str, files: Path | dict[str, bytes], private: bool = False) -> None:
        """A repository with the files of a folder, or with these files."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        self.repositories[name] = Repository(private)
        self.repositories[name].commit(files)

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a client process needs to come here and nowhere else."""
        given = {"HF_TOKEN": token} if token else {}
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **given}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    """Name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
