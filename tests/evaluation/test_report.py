"""The report in a real browser: what stands in a reply stays text, and it can be read and used anywhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsers import chromium, requested

from kestrel.config import settings
from kestrel.dialogue import Turn
from kestrel.evaluation.generations import Generations, Reply
from kestrel.evaluation.markdown import escape
from kestrel.evaluation.report import write_report
from kestrel.evaluation.sample_dialogues import sample_dialogues
from kestrel.evaluation.scoring import Evaluation, evaluate_files

ATTACKS = [
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    '"><svg onload="document.title = \'taken\'">',
    "{{ 7 * 7 }} {% include 'report.js' %} &lt;b&gt; <!-- ",
    "javascript:alert(1) | a | b | `x` **y** [z](http://example.org) $\\frac{1}{2}$",
]
DIALOGUES = 9


def name(d: int) -> str:
    return f"dialogue <{d}> & 'more'"


def replies(system: str) -> list[Reply]:
    """Dialogue d has d replies that are right, so that their order is known; some texts attack the page."""
    rows = []
    for d in range(DIALOGUES):
        for t in range(DIALOGUES):
            attack = ATTACKS[(d + t) % len(ATTACKS)]
            reference = f"i have {t} dogs and word{d} {attack}" if t == 0 else f"i have {t} dogs and word{d}"
            right = t < d if system == "adapter" else t < 1
            rows.append(
                Reply(
                    dialogue_id=name(d),
                    turn=2 * t + 1,
                    reference=reference,
                    response=reference if right else ("" if t == 8 else f"other {attack}"),
                    line=len(rows) + 1,
                    persona=(f"persona {attack}", "i like dogs ."),
                    history=tuple(
                        Turn("self", "mine") if i % 2 else Turn("partner", f"turn {i} of {d}") for i in range(2 * t + 1)
                    ),
                    stopped_by="length" if t == 8 else "eos",
                    reference_nll=9.0,
                    reference_tokens=8,
                )
            )
    return rows


def make_evaluation(names=("adapter", "base")) -> Evaluation:
    files = [Generations(name, "test", Path(f"test.{name}.jsonl"), "0", replies(name)) for name in names]
    return evaluate_files(files, [f"a note with {ATTACKS[0]}"], settings.Evaluation(resamples=100), 0, ["i have dogs"])


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(("adapter", "base", "we$ird <b>|`name`"))


@pytest.fixture(scope="module")
def folder(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    log = folder / "training.jsonl"
    steps = [{"step": s, "loss": 3 - s / 100} for s in range(20)] + [{"step": 10, "eval_loss": 2.5}]
    log.write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 2', encoding="utf-8")
    write_report(folder, evaluation, log, samples=100, seed=0)
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium() as chrome:
        yield chrome


@pytest.fixture
def page(browser, folder):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get((folder / "report.html").as_uri())
    return browser


def visible(page) -> list[str]:
    """Names of the dialogues that can be seen, in order."""
    script = "return [...document.querySelectorAll('.dialogue:not([hidden]) .name')].map(e => e.textContent)"
    return page.execute_script(script)


def choose(page, control: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", control)).select_by_value(value)


def test_what_stands_in_a_reply_stays_text_and_nothing_is_asked_of_a_network(page, evaluation, folder):
    assert set(requested(page)) == {(folder / "report.html").as_uri()}
    assert page.title == "Evaluation: test"
    assert page.execute_script("return document.scripts.length") == 1
    assert page.execute_script("return document.querySelectorAll('img, main svg[onload], b b').length") == 0
    shown = page.execute_script("return [...document.querySelectorAll('.turn.reference span')].map(e => e.textContent)")
    assert sorted(shown) == sorted(reply.reference for reply in evaluation.systems["gold"].replies)
    assert not [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_a_script_that_got_in_would_not_run(page):
    """The second lock: the page's own policy."""
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = \"document.title = 'taken'\"; document.body.append(s)"
    )
    assert page.title == "Evaluation: test"
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_order_search_and_filter(page):
    assert visible(page) == [name(d) for d in reversed(range(DIALOGUES))]  # the best first
    choose(page, "order", "worst")
    assert visible(page) == [name(d) for d in range(DIALOGUES)]
    search = page.find_element("id", "search")
    search.send_keys("WORD3 dogs")
    assert visible(page) == [name(3)]
    assert page.find_element("id", "count").text == f"1 of {DIALOGUES}"
    search.clear()
    search.send_keys("nowhere to be found")
    assert visible(page) == [] and page.find_element("id", "nothing").is_displayed()
    search.clear()
    search.send_keys(" ")
    choose(page, "filter", "flag:empty")
    assert visible(page) == [name(d) for d in range(DIALOGUES)]
    choose(page, "filter", "chosen:extreme")
    assert visible(page) == []  # all are shown, so none was chosen for its score
    choose(page, "filter", "")
    page.find_element("id", "persona").send_keys("DOGS {{")
    assert visible(page) == [name(3), name(8)], "the words are in these personas"
    page.find_element("id", "persona").clear()
    page.find_element("id", "persona").send_keys("dogs")
    choose(page, "metric", "perplexity.token")
    choose(page, "order", "best")
    assert visible(page) == [name(d) for d in range(DIALOGUES)]  # all alike, so as in the file
    choose(page, "metric", "f1")
    choose(page, "order", "ahead")
    assert visible(page)[0] == name(8), "where the adapter has most right and the other one reply"
    choose(page, "system", "base")
    choose(page, "order", "file")
    assert page.find_element("css selector", ".dialogue .score data").text != "", "scores follow the choice"


def test_keyboard_is_enough(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(page).send_keys(Keys.TAB).perform()
    skip = page.switch_to.active_element
    assert skip.text == "Skip to the dialogues" and skip.is_displayed()
    ActionChains(page).send_keys(Keys.ENTER).send_keys(Keys.TAB).perform()
    assert page.switch_to.active_element.get_attribute("id") == "search"
    ActionChains(page).send_keys(*[Keys.TAB] * 6).perform()
    summary = page.switch_to.active_element
    dialogue = summary.find_element("xpath", "..")
    assert summary.tag_name == "summary" and dialogue.get_attribute("open")
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert not dialogue.get_attribute("open")
    ActionChains(page).send_keys("jj").perform()
    second = page.switch_to.active_element.find_element("xpath", "..")
    assert second.get_attribute("open") and second.text.startswith(visible(page)[2])
    ActionChains(page).send_keys("k/").perform()
    assert page.switch_to.active_element.get_attribute("id") == "search"


@pytest.mark.parametrize("width", [320, 380, 768, 1280])
def test_fits_the_screen(page, width):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.get(page.current_url)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = page.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, select') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    )
    assert beyond == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_in_both_themes(page, theme):
    """Contrast of at least 4.5 (WCAG AA) of every colour of text, in the plots too."""
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    page.get(page.current_url)
    background, texts = page.execute_script(
        """
        const seen = new Set();
        for (const e of document.querySelectorAll('body, main *, footer *')) {
          const text = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
          if (text) seen.add(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']);
        }
        return [getComputedStyle(document.body).backgroundColor, [...seen]];
        """
    )

    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (luminance(background) > 0.5) == (theme == "light")
    assert len(texts) > 4
    for text in texts:
        high, low = sorted((luminance(text), luminance(background)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, text


def test_html_is_well_formed(folder):
    """Every tag is closed in turn, and no id stands twice: plots are drawn apart and put into one page."""
    void = {"meta", "input", "link", "br", "hr", "img"}
    open_tags, ids = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            ids.extend(value for key, value in attributes if key == "id")
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag, self.getpos()

    text = (folder / "report.html").read_text(encoding="utf-8")
    Reader().feed(text)
    assert open_tags == []
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([^)"]+)', text):
        assert target in ids
    assert "http://" not in re.sub(r'xmlns[^ ]*="[^"]*"|http://example.org', "", text) and "https://" not in text


def test_markdown_holds_the_same_and_stays_text(folder, evaluation):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert evaluation.metrics["signature"] in text
    for system in ("adapter", "base", "constant_words", "gold"):
        assert f"| {system} |" in text
    assert "<script" not in text and "<img" not in text and "[z](" not in text
    pictures = re.findall(r"\((\w+)\.png\)", text)
    assert set(pictures) == {"scores", "further", "by_reply", "by_length", "lengths", "loss"}
    assert all((folder / f"{picture}.png").stat().st_size > 1000 for picture in pictures)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a | <i> `c` *d* [e](f) & g\nh", r"a \| &lt;i&gt; \`c\` \*d\* \[e\](f) &amp; g h"),
        ("constant_words _so_ it's 3.5 - 2", r"constant_words \_so\_ it's 3.5 - 2"),
        ("- no", r"\- no"),
        ("# no", r"\# no"),
        ("1. no", r"1\. no"),
        ("> no", "&gt; no"),
        ("~~no~~ $x$ \\", r"\~\~no\~\~ \$x\$ \\"),
    ],
)
def test_escape_markdown(text, escaped):
    assert escape(text) == escaped


def test_sample_holds_best_worst_and_others(evaluation):
    sample = sample_dialogues(evaluation, 6, seed=0)
    assert sorted(d.chosen for d in sample) == ["extreme"] * 4 + ["random"] * 2
    assert (sample[0].dialogue_id, sample[-1].dialogue_id) == (name(8), name(0))
    assert sample == sample_dialogues(evaluation, 6, seed=0)
    scores = [d.scores["rouge_l"]["adapter"] for d in sample]
    assert scores == sorted(scores, reverse=True)
    exchanges = sample[0].exchanges
    assert [turn.text for turn in exchanges[1].turns] == ["turn 2 of 8"]  # what was said before stands above
    assert sample_dialogues(evaluation, 0, seed=0) == []


def test_without_likelihoods_log_or_dialogues(tmp_path):
    """A bare file from elsewhere has a report too, and the command that checks its BLEU names its tokenizer."""
    rows = [Reply(f"row {i}", 0, f"我养了{i}只狗", f"我养了{i}只猫", i) for i in range(5)]
    files = [Generations("theirs", None, Path("theirs.jsonl"), "0", rows, ("dialogue_id", "history"))]
    evaluation = evaluate_files(files, [], settings.Evaluation(resamples=100), 0, None)
    write_report(tmp_path, evaluation, tmp_path / "none", samples=0, seed=0)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "sacrebleu responses/reference.txt -i responses/theirs.txt -m bleu -w 4 -tok zh" in text
    assert "no dialogues are shown" in text and "further-caption" not in text and "loss-caption" not in text
