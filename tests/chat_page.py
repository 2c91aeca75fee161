"""chat.py --web as a process, and its page in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
PERSONA = ["i have a dog .", "i live in rome ."]
AS_PERSONA = ["--persona", *PERSONA]
GREEDY = ["--generation.do_sample", "false"]
LONG = [*GREEDY, "--prompt.max_length", "2000"]  # so that no conversation of these tests is cut
# The contrast between the text of an element, named by its selector, and the ground behind it, as WCAG 2 defines it.
CONTRAST = """
    const shade = color => {
        const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
        for (const layer of color) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
            c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = [];
    for (let e = document.querySelector(arguments[0]); e; e = e.parentElement)
        behind.unshift(getComputedStyle(e).backgroundColor);
    const text = getComputedStyle(document.querySelector(arguments[0])).color;
    const [low, high] = [shade(behind), shade([...behind, text])].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
"""


class Served:
    """chat.py --web as a process, which is killed at the end of a with block."""

    def __init__(self, arguments: list[str], *more: str, **environment: str):
        command = [sys.executable, "chat.py", *arguments, "--persona", *PERSONA, "--web", "--port", "0", *more]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "no_proxy": "*", **environment},
        )  # fmt: skip
        assert self.process.stdout and self.process.stderr
        self.printed = ""
        while not (found := re.search(r"http://(\S+):(\d+)(\S*) in a browser", self.printed)):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.printed += line
        self.port, self.token = int(found[2]), found[3].partition("token=")[2]
        self.url = f"http://127.0.0.1:{self.port}/"

    def end(self, number: int) -> tuple[int, str]:
        """Sends a signal; returns the exit status and the remaining output."""
        self.process.send_signal(number)
        output = self.process.communicate(timeout=30)
        return self.process.returncode, "".join(output)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


class Page:
    """The page in a browser."""

    def __init__(self, browser: Any, url: str):
        stale = [StaleElementReferenceException]
        self.browser, self.waiting = browser, WebDriverWait(browser, 30, 0.05, ignored_exceptions=stale)
        browser.get(url)
        self.until(lambda: self.find("#message textarea") and self.find("#export") and self.find("#persona textarea"))
        self.until(self.idle)

    def until(self, condition):
        return self.waiting.until(lambda _: condition())

    def find(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.browser.execute_script(script, selector))

    def messages(self, system: str = "adapter") -> list[str]:
        """Messages in a system's column."""
        return self.texts(f"#{system} .user .message-content")

    def answers(self, system: str = "adapter") -> list[str]:
        return self.texts(f"#{system} .bot .message-content")

    def box(self) -> str:
        return str(self.find("#message textarea")[0].get_attribute("value"))

    def toast(self, text: str) -> None:
        """Waits for a message of the page."""
        self.until(lambda: any(text in shown for shown in self.texts(".toast-body")))

    def idle(self) -> bool:
        return bool(self.find("#message .submit-button")) and not self.find("#message .stop-button")

    def type(self, text: str) -> None:
        self.find("#message textarea")[0].send_keys(text)

    def begin(self, message: str) -> None:
        """Sends a message and waits for the first characters of its answer."""
        before = len(self.messages())
        self.type(message + "\n")
        self.until(lambda: len(self.messages()) == before + 1 and len(self.answers()[-1]) > 1 and not self.idle())

    def say(self, message: str, system: str = "adapter") -> None:
        """Sends a message and waits for the whole answer."""
        before = len(self.messages(system))
        self.type(message + "\n")
        self.until(lambda: len(self.messages(system)) == before + 1 and self.idle())

    def click(self, selector: str) -> None:
        self.find(selector)[0].click()
