"""The page in a real browser: streaming, side by side, text that stays text, and no request to anybody else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browsers import chromium
from chat_page import AS_PERSONA, CONTRAST, LONG, PERSONA, Page, Served
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = [*LONG, "--generation.max_new_tokens", "1900", "--generation.stop_strings", "[]"]
ATTACK = (
    "</span></p><script>document.title = 'taken'</script><img src=\"http://example.org/x.png\" "
    "onerror=\"document.title='taken'\"><b>b</b> &lt;i&gt; &amp;lt; **b** `x` $x^2$ [z](javascript:alert(1)) {{ 7 * 7 }} "
    "<thinking>t</thinking> http://example.org  \\n"
)


@pytest.fixture(scope="module")
def endless(trained):
    """A server whose answers would take a minute."""
    with Served(trained.arguments(*ENDLESS)) as server:
        yield server


@pytest.fixture
def answering(browser, endless):
    """A page in the middle of an answer."""
    page = Page(browser, endless.url)
    page.begin("hi !")
    yield page
    if not page.idle():
        page.click("#message .stop-button")
        page.until(page.idle)


def test_compare_undo_export_start_over_and_change_system(page, trained, temporary, tmp_path):
    page.say("hi ! do you have a pet ?")
    assert not page.find("#base .message")
    page.click("#compare input")
    page.say("what do you eat ?")
    page.say("oh no !")
    page.click("#undo")
    page.until(lambda: page.idle() and len(page.messages()) == 2)
    assert page.box() == "oh no !"
    assert page.messages("base") == ["what do you eat ?"]
    page.click("#export")
    page.until(lambda: list(page.browser.downloads.glob("chat-*.jsonl")))
    (file,) = page.browser.downloads.glob("chat-*.jsonl")
    (row,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert file.stem == row["dialogue_id"] and row["persona"] == PERSONA
    assert [turn["text"] for turn in row["turns"][::2]] == page.messages()
    assert [turn["text"] for turn in row["turns"][1::2]] == page.answers()
    assert [row["turns"][3]["beside"]["base"]] == page.answers("base")
    assert not [path for path in temporary.rglob("*") if path.is_file()], "the server stores no conversation"

    # The same messages in a terminal get the same answers.
    typed = f"hi ! do you have a pet ?\n/compare what do you eat ?\n/save {tmp_path / 'x.jsonl'}\n"
    command = [sys.executable, "chat.py", *trained.arguments(*LONG, *AS_PERSONA)]
    subprocess.run(command, cwd=ROOT, input=typed, text=True, check=True, capture_output=True)
    assert json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))["turns"] == row["turns"]

    box = page.find("#persona textarea")[0]
    box.clear()
    box.send_keys("i have a cat .")
    page.click("#reset")
    page.until(lambda: page.messages() == [])
    page.click("#compare input")
    page.say("hi !")
    assert len(page.answers()) == 1
    page.find("#system input")[1].click()
    page.say("and you ?", "base")
    assert (page.messages(), page.messages("base")) == (["hi !"], ["and you ?"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_keeps_the_answer_so_far_and_a_signal_ends_the_server(number, browser, trained):
    with Served(trained.arguments(*ENDLESS)) as server:
        page = Page(browser, server.url)
        page.begin("hi !")
        page.click("#message .stop-button")
        page.until(page.idle)
        assert page.messages() == ["hi !"] and 0 < len(page.answers()[0]) < 4000, len(page.answers()[0])
        status, output = server.end(number)
        assert status == 128 + number and "not exported are lost" in output and "Traceback" not in output


def test_answer_grows_and_the_next_message_can_be_typed_meanwhile(answering):
    lengths = []
    for _ in range(3):
        lengths.append(len(answering.answers()[0]))
        answering.until(lambda: len(answering.answers()[0]) > lengths[-1])
    answering.type("my next one")
    length = len(answering.answers()[0])
    answering.until(lambda: len(answering.answers()[0]) > length + 20)
    assert answering.box() == "my next one"


def test_undo_during_an_answer_removes_it_and_restores_the_message(answering):
    answering.click("#undo")
    answering.until(answering.idle)
    assert answering.messages() == [] and answering.box() == "hi !"


def test_page_that_starts_over_or_is_reloaded_gets_nothing_of_the_lost_answer(answering):
    answering.find("#persona textarea")[0].send_keys("\ni am new .")
    answering.click("#reset")
    answering.until(answering.idle)
    time.sleep(1)
    assert answering.messages() == []
    answering.begin("who are you ?")
    assert answering.messages() == ["who are you ?"]
    page = Page(answering.browser, answering.browser.current_url)
    page.begin("again ?")
    assert page.messages() == ["again ?"]


def test_second_page_shows_its_message_and_can_leave_the_queue(answering, endless):
    with chromium() as other:
        page = Page(other, endless.url)
        page.type("me too\n")
        page.until(lambda: page.messages() == ["me too"] and page.answers() == ["…"])
        page.toast("The model answers somebody else")
        page.click("#message .stop-button")
        page.until(page.idle)  # long before the other answer ends
        assert page.messages() == [] and page.box() == "me too"
    assert not answering.idle()


def test_long_conversation_scrolls_to_its_end(page):
    for number in range(8):
        page.say(f"hi ! number {number} ?")
    frame, last = (
        page.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", page.find(selector)[-1])
        for selector in ("#adapter", "#adapter .bot .message-content")
    )
    assert frame["top"] < last["top"] and last["bottom"] <= frame["bottom"]


def test_on_a_phone_the_conversation_comes_first_and_nothing_is_cut_off(page):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.until(lambda: page.browser.execute_script("return innerWidth") == 390)
        place = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
        box, talk, persona = (page.browser.execute_script(place, name) for name in ("#message", "#adapter", "#persona"))
        assert talk["top"] < box["top"] < persona["top"] and box["bottom"] < 844
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert abs(persona["width"] - talk["width"]) < 2
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(page, scheme):
    """4.5 between each text and the ground behind it, as WCAG asks."""
    scheme_is = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_is)
    try:
        page = Page(page.browser, page.browser.current_url)
        page.click("#compare input")
        page.say("hi !")
        for selector in ("#adapter .user .message-content span", "#base .bot .message-content span",
                         "#base label[data-testid=block-label] span", "#persona textarea", "#undo",
                         "#persona [data-testid=block-info]", "#system label.selected",
                         "#system [data-testid=block-info]"):  # fmt: skip
            assert page.browser.execute_script(CONTRAST, selector) >= 4.5, selector
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_controls_change_the_answers(page):
    def answer_to_the_same() -> str:
        page.browser.execute_script("document.querySelectorAll('.toast-close').forEach(e => e.click())")
        page.click("#reset")
        page.until(lambda: page.messages() == [] and not page.box() and not page.find(".toast-body"))
        page.type("what do you eat ?\n")
        # A sampled answer may be empty; the page then says so.
        page.until(lambda: page.idle() and (page.answers() or page.find(".toast-body")))
        return page.answers()[0] if page.answers() else ""

    def put(label: str, value: str) -> None:
        box = page.find(f"input[type=number][aria-label*='{label}']")[0]
        box.send_keys(Keys.CONTROL + "a" + Keys.NULL, value, Keys.TAB)

    page.say("what do you eat ?")
    likeliest = page.answers()[0]
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
    again = answer_to_the_same()  # with the likeliest token each time, whatever length the page has taken over by now
    assert again and (again.startswith(likeliest) or likeliest.startswith(again))


def test_page_says_what_is_wrong(page):
    box, persona = page.find("#message textarea")[0], page.find("#persona textarea")[0]
    for text, message in (("  ", "The message is empty."), ("dog " * 2500, "persona and message together exceed")):
        page.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            box, text,
        )  # fmt: skip
        page.click("#message .submit-button")
        page.toast(message)
    for button, message in (("#undo", "No message to take back."), ("#export", "nothing to save")):
        page.click(button)
        page.toast(message)
    persona.send_keys(Keys.CONTROL + "a" + Keys.NULL, Keys.DELETE)
    page.click("#reset")
    page.toast("at least one sentence")


def test_text_stays_text(page):
    page.browser.get_log("browser")
    page.click("#compare input")
    page.say(ATTACK)
    assert page.messages() == [ATTACK] and page.messages("base") == [ATTACK]
    assert page.browser.title == "Kestrel"
    assert not page.find(".message-content :is(img, script, a, b, i, thinking, iframe)")
    label = (
        "return [...document.querySelectorAll('button')].find(e => e.textContent.includes('Saved personas')).click()"
    )
    page.browser.execute_script(label)
    name = page.find("#adapter-name textarea, #adapter-name input")[0]
    page.until(name.is_displayed)
    name.send_keys("<b>an</b> <img src=x>adapter\n")
    page.toast("model.adapter <b>an</b> <img src=x>adapter: no such folder")
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
