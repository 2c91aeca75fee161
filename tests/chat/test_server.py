"""The page in a real browser: streaming, side by side, text that stays text, and no word to anybody elsewhere."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from browsers import chromium, requested
from chat_page import CONTRAST, PERSONA, Page, Served
from selenium.webdriver.common.keys import Keys

import chat
from kestrel.chat.conversation import Conversation
from kestrel.chat.server import is_loopback
from kestrel.config.settings import Generation

ROOT = Path(__file__).resolve().parents[2]
LONG = ["--prompt.max_length", "2000"]  # the longest of what is said here is no concern of these tests
ATTACK = (
    "</p><script>document.title = 'taken'</script><img src=\"http://example.org/x.png\" onerror=\"document.title='taken'\">"
    "{{ 7 * 7 }} ${7 * 7} @children &lt;b&gt; **b** `x` $x^2$ [z](javascript:alert(1)) \\n"
)


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_which_hosts_are_this_machine_alone(host, alone):
    assert is_loopback(host) is alone


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_stop_button_ends_an_answer_and_keeps_it(number, browser, trained, tmp_path):
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
        status, told = server.end(number)
        assert status == 128 + number and "what was not exported is gone" in told and "Traceback" not in told
    finally:
        server.process.kill()


def test_an_answer_that_fails_leaves_no_page_waiting(tmp_path):
    """As when the memory of a graphics card is used up."""
    import gradio as gr

    from kestrel.chat.page import Page as Events
    from kestrel.chat.page import Session

    class Failing:
        def context(self, dialogue):
            return [1], 0

        def exchange(self, began, *rest):
            yield began
            raise RuntimeError("out of memory")

    session = Session(Conversation(("i am here .",)))
    events = Events(cast(Any, Failing()), ("i am here .",), Generation(), tmp_path)
    shown = []
    with pytest.raises(gr.Error, match="There is no answer: out of memory"):
        for outputs in events.send("hi !", session, "i am here .", "adapter", False, False, 1, 1, 0, 8):
            shown.append(outputs)  # noqa: PERF402  what came before the error counts
    assert 'aria-busy="true"' in shown[0][2] and "nothing" in shown[-1][2] and shown[-1][0] == "hi !"
    assert session.answering is None and not session.conversation.exchanges


@pytest.fixture(scope="module")
def endless(trained):
    """A server whose answers would go on for a minute."""
    more = ["--generation.max_new_tokens", "1900", "--prompt.max_length", "2000", "--generation.stop_strings", "[]"]
    server = Served(trained.arguments(*more))
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.fixture
def speaking(browser, endless):
    """A page in the middle of an answer."""
    page = Page(browser, endless.url)
    page.begin("hi !")
    yield page
    if not page.idle():
        page.click("#message .stop-button")
        page.until(page.idle)


def test_an_answer_is_seen_as_it_grows_and_what_is_typed_meanwhile_stays(speaking):
    lengths = []
    for _ in range(3):
        lengths.append(len(speaking.said()[1]))
        speaking.until(lambda: len(speaking.said()[1]) > lengths[-1])
    box = speaking.find("#message textarea")[0]
    box.send_keys("my next one")
    length = len(speaking.said()[1])
    speaking.until(lambda: len(speaking.said()[1]) > length + 20)
    assert box.get_attribute("value") == "my next one"


def test_undone_in_the_middle_it_is_gone_and_the_message_back(speaking):
    speaking.click("#undo")
    speaking.until(speaking.idle)
    assert speaking.said() == []
    assert speaking.find("#message textarea")[0].get_attribute("value") == "hi !"


def test_begun_anew_in_the_middle_nothing_of_it_comes_later(speaking):
    box = speaking.find("#persona textarea")[0]
    box.send_keys("\ni am new .")
    speaking.click("#reset")
    speaking.until(speaking.idle)
    time.sleep(1)
    assert speaking.said() == []
    assert speaking.find("#export")[0].get_attribute("disabled")
    speaking.begin("who are you ?")
    assert speaking.texts("#transcript .message") == ["who are you ?"]


def test_a_page_that_is_loaded_anew_or_another_one_waits_for_no_lost_answer(speaking):
    speaking.browser.refresh()
    speaking.until(lambda: speaking.find("#message textarea") and speaking.find("#persona textarea"))
    speaking.begin("again ?")
    assert speaking.texts("#transcript .message") == ["again ?"]


def test_a_second_page_shows_its_message_and_can_leave_the_queue(speaking, endless):
    with chromium() as other:
        page = Page(other, endless.url)
        page.find("#message textarea")[0].send_keys("me too\n")
        page.until(lambda: page.said() == ["me too", "…"])
        page.click("#message .stop-button")
        page.until(page.idle)  # long before the other one's answer has ended
        assert page.said() == [] and page.find("#message textarea")[0].get_attribute("value") == "me too"
    assert not speaking.idle()


def test_a_long_conversation_scrolls_within_its_frame(page):
    for number in range(8):
        page.say(f"hi ! number {number} ?")
    inner, outer, end = page.browser.execute_script(
        "const t = document.querySelector('#transcript'), m = t.querySelectorAll('.message');"
        "const a = [...t.querySelectorAll('.answer')].pop();"
        "return [t.scrollHeight, t.clientHeight, t.getBoundingClientRect().bottom - a.getBoundingClientRect().bottom]"
    )
    assert inner > outer and 0 <= end < outer  # the last answer is in sight
    first = "document.querySelector('#transcript .message').getBoundingClientRect()"
    over = (
        f"const r = {first}; return document.elementFromPoint(r.left + 5, Math.max(r.top, 1) + 1)?.closest('.message')"
    )
    assert page.browser.execute_script(over) is None  # the first is not painted over what stands above


def test_on_a_phone_the_conversation_comes_first_and_nothing_is_cut_off(page):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.until(lambda: page.browser.execute_script("return innerWidth") == 390)
        place = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
        box, talk, persona = (
            page.browser.execute_script(place, name) for name in ("#message", "#transcript", "#persona")
        )
        assert talk["top"] < box["top"] < persona["top"] and box["bottom"] < 844
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert abs(persona["width"] - talk["width"]) < 2
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_written_can_be_read(page, scheme):
    """WCAG's contrast of 4.5 between each text and what is behind it."""
    scheme_is = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_is)
    try:
        page = Page(page.browser, page.browser.current_url)
        page.click("#beside input")
        page.say("hi !")
        for selector in ("#transcript .message", ".answer.talks p", ".answer:not(.talks) p", "#transcript .who",
                         "#persona textarea", "#persona [data-testid=block-info]", "#talks label.selected", "#undo",
                         "#talks [data-testid=block-info]"):  # fmt: skip
            assert page.browser.execute_script(CONTRAST, selector) >= 4.5, selector
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_controls_say_how_answers_are_made(page):
    box = page.find("#message textarea")[0]

    def answer_to_the_same() -> str:
        page.click("#reset")
        page.until(lambda: page.find("#transcript .nothing") and not box.get_attribute("value"))
        box.send_keys("what do you eat ?\n")
        # What is sampled may be empty, and is then taken back.
        answered = "#transcript [aria-busy=false]"
        page.until(lambda: page.find(answered) or "answer is empty" in "".join(page.texts(".toast-body")))
        return page.said()[1] if page.find(answered) else ""

    def put(label: str, value: str) -> None:
        page.find(f"input[type=number][aria-label*='{label}']")[0].send_keys(
            Keys.CONTROL + "a" + Keys.NULL, value, Keys.TAB
        )

    page.say("what do you eat ?")
    likeliest = page.said()[1]
    put("max_new_tokens", "2")
    shorter = answer_to_the_same()
    assert likeliest.startswith(shorter) and len(shorter) < len(likeliest)
    put("max_new_tokens", "12")
    assert len(page.find("input[type=range]")) == 1
    page.click("#sample input")
    page.until(lambda: len(page.find("input[type=range]")) == 4)
    put("temperature", "2")
    assert len({answer_to_the_same() for _ in range(4)}) > 1
    put("top_k", "1")
    assert answer_to_the_same().startswith(likeliest)


def test_a_page_says_what_it_needs(page):
    box, persona = page.find("#message textarea")[0], page.find("#persona textarea")[0]
    for keys, told in (("  \n", "There is no message."), ("dog " * 2500, "persona and message alone take more than")):
        page.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            box, keys,
        )  # fmt: skip
        page.click("#message .submit-button")
        page.until(lambda told=told: any(told in text for text in page.texts(".toast-body")))
    persona.send_keys(Keys.CONTROL + "a" + Keys.NULL, Keys.DELETE)
    page.click("#reset")
    page.until(lambda: any("at least one sentence" in text for text in page.texts(".toast-body")))
    page.click("#undo")
    page.until(lambda: any("nothing to take back" in text for text in page.texts(".toast-body")))


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
