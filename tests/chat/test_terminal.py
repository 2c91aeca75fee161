"""chat.py at a real terminal, and what signals do to it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from chat_page import AS_PERSONA, GREEDY
from hypothesis import given

from kestrel.chat.view import side_by_side
from kestrel.runtime.output import visible

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = [
    *GREEDY,
    "--generation.max_new_tokens",
    "1900",
    "--prompt.max_length",
    "2000",
    "--generation.stop_strings",
    "[]",
]


class Terminal:
    """chat.py at a terminal."""

    def __init__(self, arguments: list[str]):
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
            os.execv(sys.executable, [sys.executable, "chat.py", *arguments])

    def until(self, pattern: str) -> str:
        """What is shown from now until a pattern is."""
        seen = ""
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert select.select([self.fd], [], [], 60)[0], seen
            seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        self.seen += seen
        return found[0]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def ended(self) -> int:
        with contextlib.suppress(OSError):  # of Linux, when the other side has gone
            while select.select([self.fd], [], [], 60)[0] and (more := os.read(self.fd, 65536)):
                self.seen += more.decode("utf-8", "replace")
        for _ in range(600):  # it closes the terminal before it has ended
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                break
            time.sleep(0.1)
        else:
            os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_pasted_lines_are_one_message_and_columns_grow(trained, tmp_path):
    at = Terminal(trained.arguments(*AS_PERSONA, *GREEDY))
    at.until("you> ")
    at.type("\x1b[200~hi !\nany pets ?\x1b[201~\n")
    at.until("adapter> .*you> ")
    at.type("/compare what do you eat ?\n")
    _, *grown = at.until("│ base>.*you> $").split("\x1b[J")  # each drawn over the one before
    assert len(grown) > 3 and all("adapter>" in block and "│ base>" in block for block in grown)
    assert "…" in grown[0] and "…" not in grown[-1]
    at.type(f"/save {tmp_path / 'x.jsonl'}\n")
    at.until("holds 1.*you> $")  # at which the terminal is the line editor's again
    at.type("\x04")
    assert at.ended() == 0
    row = json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))
    assert row["turns"][0]["text"] == "hi !\nany pets ?" and len(row["turns"]) == 4


@pytest.mark.parametrize("speaking", [True, False])
def test_sigterm_ends_it_at_once(speaking, trained):
    at = Terminal(trained.arguments(*AS_PERSONA, *ENDLESS))
    at.until("you> ")
    if speaking:
        at.type("hi !\n")
        at.until("adapter> .")
    else:
        time.sleep(1)  # until it waits for a line
    os.kill(at.pid, signal.SIGTERM)
    assert at.ended() == 143
    assert "what was not saved is lost" in at.seen and "again leaves" not in at.seen


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(trained, tmp_path):
    command = [sys.executable, "chat.py", *trained.arguments(*AS_PERSONA, *ENDLESS)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        printed = b""

        def until(pattern: bytes) -> None:
            nonlocal printed
            while not re.search(pattern, printed, re.DOTALL):
                more = process.stdout.read(65536)
                assert more, (printed, process.stderr.read())
                printed += more

        process.stdin.write(b"hi !\n")
        until(rb"adapter> .")
        process.send_signal(signal.SIGINT)
        until(rb"again leaves")
        process.stdin.write(f"/save {tmp_path / 'x.jsonl'}\n/undo\n".encode())
        until(rb"taken back: hi.*you> ")
        # A signal between the prompt and the read that follows it would wait for the next line.
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        until(rb"again leaves.*again leaves.*you> ")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"what was not saved is lost" in process.stderr.read()
    row = json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))
    assert 0 < len(row["turns"][1]["text"]) < 4000  # what was said until then


@given(st.text(max_size=200), st.text(max_size=200))
def test_terminal_gets_no_control_sequences(one, two):
    printed = side_by_side({"adapter": one, "base": two})
    assert visible(printed) == printed
