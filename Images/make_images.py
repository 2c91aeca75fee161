"""Makes the README's pictures: the objective, the pipeline, the quickstart's loss curve and report, and a chat.

    make images        after make quickstart; the report and the chat need Chromium

The objective is drawn from a quickstart dialogue as `kestrel.prompt` renders it, so the picture cannot contradict the
code.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

IMAGES = Path(__file__).resolve().parent
ROOT = IMAGES.parent
sys.path.insert(0, str(ROOT))

INK, GREY, PALE, GREEN, GREEN_PALE = "#1f2933", "#8793a0", "#eef1f4", "#1b7f5c", "#d9f0e6"
WIDTH = 100.0  # of the drawing, in percent


def draw_objective() -> None:
    """The tokens of a short dialogue, the supervised ones in green, and the loss over them."""
    from kestrel.config.settings import Model
    from kestrel.data.dataset import dialogue_of, load_split
    from kestrel.prompt.prompt import IGNORED, Prompt
    from kestrel.prompt.tokenizer import load_tokenizer

    rows = load_split(ROOT / "runs" / "quickstart" / "dataset", "test", "run make quickstart first")
    row = min(rows.select(range(min(50, len(rows)))), key=lambda row: len(row["input_ids"]))
    tokenizer = load_tokenizer(Model(name=str(ROOT / "quickstart" / "base")))
    rendered = Prompt(tokenizer, "plain", 1024).render(dialogue_of(row))
    end = rendered.reply_spans[min(1, len(rendered.reply_spans) - 1)][1]
    ids, labels = rendered.input_ids[:end], rendered.labels[:end]

    figure, axes = plt.subplots(figsize=(10, 5.4))
    x, y, height = 1.0, 0.0, 5.2
    for token, label in zip(ids, labels, strict=True):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False).replace("\n", "⏎")
        width = 1.5 + 0.92 * max(1, len(text))
        if x + width > WIDTH - 1:
            x, y = 1.0, y - 8.2
        supervised = label != IGNORED
        box = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.7", linewidth=0.9,
            facecolor=GREEN_PALE if supervised else PALE, edgecolor=GREEN if supervised else "#cfd6dd",
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(
            x + width / 2, y + height / 2, text.replace(" ", "·", 1) if text.startswith(" ") else text,
            ha="center", va="center", family="monospace", fontsize=7.5, color=GREEN if supervised else INK,
        )  # fmt: skip
        x += width + 0.6
    supervised_count = sum(label != IGNORED for label in labels)
    axes.text(
        WIDTH / 2, y - 11,
        r"$\mathcal{L}(\theta)\;=\;-\frac{1}{|S|}\;\sum_{t\,\in\,S}\;\log\,p_\theta(x_t\mid x_1,\ldots,x_{t-1})$",
        ha="center", va="center", fontsize=19, color=INK,
    )  # fmt: skip
    axes.text(
        WIDTH / 2, y - 18.5,
        f"S, in green: the tokens of the persona owner's replies, each with its end token ({supervised_count} of these "
        f"{len(ids)} tokens).\nEach reply is predicted from everything before it, all replies in one pass; |S| counts the "
        "whole global batch.",
        ha="center", va="center", fontsize=9, color=GREY, linespacing=1.6,
    )  # fmt: skip
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(y - 22, height + 2)
    axes.axis("off")
    figure.savefig(IMAGES / "objective.png", dpi=160, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def draw_pipeline() -> None:
    """The scripts, what each writes to disk and what each checks."""
    stages = [
        ("preprocess.py", "dialogues →\nsequences", "dataset/", "prompt is a token prefix,\nend of reply supervised,\nsplits share no persona"),
        ("train.py", "LoRA on\nNF4 Falcon", "adapter/\nlogs/  samples.jsonl", "4-bit layers counted,\nadapter changes,\nsaved = loaded"),
        ("generate.py", "adapter and\nbase answer", "generations/", "same prompt,\nsame base and adapter,\nsame likelihood"),
        ("evaluate.py", "BLEU, ROUGE-L,\nF1, perplexity", "evaluation/", "against trivial systems,\n95% intervals,\npaired test"),
    ]  # fmt: skip
    figure, axes = plt.subplots(figsize=(10, 3.9))
    for index, (script, does, writes, checks) in enumerate(stages):
        x = index * 25 + 1
        axes.add_patch(
            FancyBboxPatch(
                (x, 20), 21, 13, boxstyle="round,pad=0,rounding_size=1.2", facecolor=GREEN_PALE, edgecolor=GREEN
            )
        )
        axes.text(x + 10.5, 29.4, script, ha="center", va="center", family="monospace", fontsize=11, color=GREEN)
        axes.text(x + 10.5, 24.3, does, ha="center", va="center", fontsize=9, color=INK, linespacing=1.3)
        axes.text(x + 10.5, 15.4, writes, ha="center", va="center", family="monospace", fontsize=8.5, color=INK)
        axes.text(x + 10.5, 6, checks, ha="center", va="center", fontsize=8.5, color=GREY, linespacing=1.4)
        if index:
            axes.add_patch(
                FancyArrowPatch((x - 3.7, 26.5), (x - 0.4, 26.5), arrowstyle="-|>", mutation_scale=13, color=GREY)
            )
    axes.text(1, 36.5, "one YAML file", fontsize=10, color=INK, family="monospace")
    axes.plot([17, 97], [37.2, 37.2], color="#cfd6dd", linewidth=1)
    for y, label in ((15.4, "writes"), (6, "checks")):
        axes.text(-1.2, y, label, fontsize=8, color=GREY, rotation=90, va="center", ha="center")
    axes.set_xlim(-3, 100)
    axes.set_ylim(0, 40)
    axes.axis("off")
    figure.savefig(IMAGES / "pipeline.png", dpi=160, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def capture_report() -> None:
    """The top of the quickstart's report, in headless Chromium.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    page = ROOT / "runs" / "quickstart" / "evaluation" / "report.html"
    with tempfile.TemporaryDirectory() as profile:
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--window-size=1100,1650", f"--screenshot={IMAGES / 'report.png'}",
            page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def capture_chat() -> None:
    """A conversation with the quickstart's adapter in the browser, next to the base's answers.

    Raises:
        RuntimeError: `chat.py --web` does not start.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    persona = ["i live in dublin.", "i am crazy about curry.", "i drink a lot of cider.", "i have six sisters."]
    messages = ["hi, i am emma. how are you?", "who is important to you?", "what did you have for dinner?"]
    command = [sys.executable, "chat.py", "--config", "configs/quickstart.yaml", "--persona", *persona]
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "hide-scrollbars",
                 "disable-background-networking", "disable-component-update", "window-size=1280,860",
                 "force-device-scale-factor=1.5"):  # fmt: skip
        options.add_argument(f"--{flag}")
    with subprocess.Popen([*command, "--web", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next((line.split()[1] for line in server.stdout if "in a browser" in line), None)
            if address is None:
                raise RuntimeError("chat.py --web did not start; its message is above")
            browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
            try:
                browser.get(address)
                waiting = WebDriverWait(browser, 60)
                waiting.until(lambda page: page.find_elements("css selector", "#compare input")).pop().click()
                for count, message in enumerate(messages, start=1):
                    browser.find_element("css selector", "#message textarea").send_keys(f"{message}\n")
                    answered = (
                        "return document.querySelector('#message .submit-button') !== null && "
                        f"document.querySelectorAll('#base .bot .message-content').length === {count}"
                    )
                    waiting.until(lambda page, script=answered: page.execute_script(script))
                browser.save_screenshot(str(IMAGES / "chat.png"))
            finally:
                browser.quit()
        finally:
            server.terminate()


def main() -> int:
    run = ROOT / "runs" / "quickstart"
    if not (run / "evaluation" / "metrics.json").exists():
        print("make_images.py: run make quickstart first", file=sys.stderr)
        return 1
    draw_objective()
    draw_pipeline()
    shutil.copyfile(run / "logs" / "loss.png", IMAGES / "loss.png")
    capture_report()
    capture_chat()
    versions = json.loads((run / "adapter" / "manifest.json").read_text(encoding="utf-8"))["versions"]
    names = "objective.png, pipeline.png, loss.png, report.png and chat.png"
    print(f"wrote {names} to {IMAGES.name}/ (torch {versions['torch']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
