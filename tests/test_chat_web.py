"""The page in a real browser: streaming, side by side, text that stays text, and no word to anybody elsewhere."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browsers import chromium, requested
from hypothesis import given
from hypothesis import strategies as st

import chat
from kestrel.chat.conversation import Exchange
from kestrel.chat.transcript import as_text, transcript
from kestrel.chat.web import is_loopback

ROOT = Path(__file__).resolve().parent.parent
LONG = ["--prompt.max_length", "2000"]  # the longest of what is said here is no concern of these tests
PERSONA = ["i have a dog .", "i live in rome ."]
ATTACK = (
    "</p><script>document.title = 'taken'</script><img src=\"http://example.org/x.png\" onerror=\"document.title='taken'\">"
    "{{ 7 * 7 }} ${7 * 7} @children &lt;b&gt; **b** `x` $x^2$ [z](javascript:alert(1)) \\n"
)


@given(st.text())
def test_what_is_said_is_text_and_no_template(text):
    shown = as_text(text)
    assert html.unescape(shown) == html.unescape(html.escape(text))
    assert not set("<>\"'${}`@") & set(shown)
    page = transcript([Exchange(text, "adapter", text, {"base": text})])
    assert page.count("<p") == 3 and page.count("<") == transcript([Exchange("", "adapter", "", {"base": ""})]).count(
        "<"
    )


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_which_hosts_are_this_machine_alone(host, alone):
    assert is_loopback(host) is alone


class Served:
    """chat.py --web as a process."""

    def __init__(self, arguments: list[str], *more: str):
        command = [sys.executable, "chat.py", *arguments, "--persona", *PERSONA, "--web", "--port", "0", *more]
        # A proxy of the environment is what a page of this machine must not be asked through.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "no_proxy": "*"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout and self.process.stderr
        self.printed = ""
        while not (found := re.search(r"http://(\S+):(\d+) in a browser", self.printed)):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.printed += line
        self.port = int(found[2])
        self.url = f"http://127.0.0.1:{self.port}/"

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=30)
        return self.process.returncode, "".join(said)


@pytest.fixture(scope="module")
def served(trained):
    server = Served(trained.arguments(*LONG))
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    with chromium(**{"download.default_directory": str(folder), "download.prompt_for_download": False}) as chrome:
        chrome.downloads = folder
        yield chrome


class Page:
    """The page as its user has it."""

    def __init__(self, browser: Any, url: str):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser = browser
        self.waiting = WebDriverWait(browser, 30, poll_frequency=0.05)
        browser.get(url)
        self.until(lambda: self.find("#message textarea") and self.find("#export") and self.find("#persona textarea"))

    def until(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException

        def holds(_):
            try:
                return condition()
            except StaleElementReferenceException:
                return None

        return self.waiting.until(holds)

    def find(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.browser.execute_script(script, selector))

    def said(self) -> list[str]:
        return self.texts("#transcript p")

    def idle(self) -> bool:
        return bool(self.find("#transcript .nothing, #transcript [aria-busy=false]"))

    def say(self, message: str) -> None:
        """Types a message and waits until it is answered."""
        before = len(self.texts("#transcript .message"))
        self.find("#message textarea")[0].send_keys(message + "\n")
        self.until(lambda: len(self.texts("#transcript .message")) == before + 1 and self.idle())

    def click(self, selector: str) -> None:
        self.find(selector)[0].click()


@pytest.fixture
def page(browser, served):
    return Page(browser, served.url)


def test_streamed_beside_undone_begun_anew_and_exported(page, served, trained, tmp_path, capsys):
    assert page.find("#export")[0].get_attribute("disabled")
    page.say("hi ! do you have a pet ?")
    page.click("#beside input")
    page.say("what do you eat ?")
    page.say("oh no !")
    page.click("#undo")
    page.until(lambda: page.idle() and len(page.texts("#transcript .message")) == 2)
    assert page.find("#message textarea")[0].get_attribute("value") == "oh no !"
    assert page.texts("#transcript .who") == ["adapter", "adapter", "base"]
    page.click("#export")
    page.until(lambda: list(page.browser.downloads.glob("chat-*.jsonl")))
    (file,) = page.browser.downloads.glob("chat-*.jsonl")
    (row,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    shown = [turn["text"] for turn in row["turns"]] + [row["turns"][3]["beside"]["base"]]
    assert row["persona"] == PERSONA and shown == page.texts("#transcript p")

    # The same words in a terminal get the same answers.
    typed = f"hi ! do you have a pet ?\n/compare what do you eat ?\n/save {tmp_path / 'x.jsonl'}\n"
    command = [sys.executable, "chat.py", *trained.arguments(*LONG, "--persona", *PERSONA)]
    subprocess.run(command, cwd=ROOT, input=typed, text=True, check=True, capture_output=True)
    assert json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))["turns"] == row["turns"]

    box = page.find("#persona textarea")[0]
    box.clear()
    box.send_keys("i have a cat .")
    page.click("#reset")
    page.until(lambda: page.find("#transcript .nothing"))
    page.say("hi !")
    assert len(page.texts("#transcript p")) == 3


def test_the_stop_button_ends_an_answer_and_keeps_it(browser, trained, tmp_path):
    endless = ["--generation.max_new_tokens", "1900", "--prompt.max_length", "2000", "--generation.stop_strings", "[]"]
    server = Served(trained.arguments(*endless))
    try:
        page = Page(browser, server.url)
        page.find("#message textarea")[0].send_keys("hi !\n")
        page.until(lambda: page.find("#transcript [aria-busy=true]"))
        page.click("#message .stop-button")
        page.until(page.idle)
        said = page.texts("#transcript p")
        assert said[0] == "hi !" and 0 < len(said[1]) < 4000
        status, told = server.end()
        assert status == 130 and "what was not exported is gone" in told
    finally:
        server.process.kill()


def test_what_is_said_stays_text(page):
    page.browser.get_log("browser")
    page.click("#beside input")
    page.say(ATTACK)
    assert page.texts("#transcript .message") == [ATTACK]
    assert page.browser.title == "Kestrel"
    assert (
        page.browser.execute_script("return document.querySelectorAll('#transcript :is(img, script, a, b)').length")
        == 0
    )
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_no_request_leaves_this_machine(browser, served):
    """By itself it asks nobody, and a page that would is not let."""
    requested(browser)  # of other tests
    page = Page(browser, served.url)
    page.say("hi !")
    asked = {urlsplit(url) for url in requested(page.browser)}
    assert {url.netloc for url in asked if url.scheme not in ("data", "blob")} == {f"127.0.0.1:{served.port}"}
    blocked = """
        const done = arguments[0];
        fetch('http://example.org/').then(() => done('fetched'), () => done('refused'))
    """
    assert page.browser.execute_async_script(blocked) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in page.browser.get_log("browser"))


def test_only_this_machine_is_served_and_only_by_its_name(served):
    request = urllib.request.Request(served.url, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert "everybody" not in served.printed
    with socket.socket() as outside:
        assert outside.connect_ex(("127.0.0.2", served.port)) != 0  # it listens at one address, not at all


def test_an_open_host_is_announced_and_a_taken_port_refused(served, trained, capsys):
    server = Served(trained.arguments(), "--host", "0.0.0.0")
    try:
        assert server.process.stdout
        assert "There is no password and no encryption." in server.process.stdout.readline()
    finally:
        server.process.kill()
        server.process.communicate()
    taken = trained.arguments("--persona", *PERSONA, "--web", "--port", str(served.port))
    assert chat.main(taken) == 1
    assert f"cannot listen at 127.0.0.1, port {served.port}" in capsys.readouterr().err
