"""The blind sheet: what it shows and hides, how it is filled in a browser, and what the judgements say."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium
from scripts import make_run, read_metrics, script

from kestrel.evaluation.judgements import kendall, sign_test
from kestrel.evaluation.sheet import _as_csv

main = script("evaluate").main


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose run has a sheet of 20 pairs."""
    config = make_run(tmp_path_factory.mktemp("judged"))
    assert main(["--config", str(config), "--evaluation.resamples", "100", "--evaluation.sheet", "20"]) == 0
    return config


@pytest.fixture(scope="module")
def sheet(config: Path) -> Path:
    return config.parent / "run" / "sheet"


@pytest.fixture(scope="module")
def key(sheet: Path) -> dict[str, Any]:
    return json.loads((sheet / "key.json").read_text(encoding="utf-8"))


def test_no_spreadsheet_takes_a_reply_for_a_formula() -> None:
    formulas = ["=HYPERLINK(1)", "+1+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]
    items = [{"item": "1", "persona": [text], "history": [], "left": text, "right": "a - b"} for text in formulas]
    for text, row in zip(formulas, csv.DictReader(io.StringIO(_as_csv("x", items), newline="")), strict=True):
        assert row["left"] == row["persona"] == f"'{text}" and row["right"] == "a - b"


def favour(key: dict[str, Any], system: str) -> dict[str, str]:
    """Choices of a judge who always prefers one system."""
    return {item: "left" if place["left"] == system else "right" for item, place in key["items"].items()}


def test_the_sheet_is_blind_and_stays_as_it_is(config, sheet, key, capsys):
    assert len(key["items"]) == 20 and {place["left"] for place in key["items"].values()} == {"adapter", "base"}
    rows = list(csv.DictReader(io.StringIO((sheet / "sheet.csv").read_text(encoding="utf-8"))))
    assert [row["item"] for row in rows] == list(key["items"])
    assert all(row["left"] != row["right"] and row["persona"] and row["choice"] == "" for row in rows)
    for name in ("sheet.html", "sheet.csv"):
        text = (sheet / name).read_text(encoding="utf-8").rpartition("</style>")[2]
        assert "adapter" not in text and "base" not in text
    before = {path.name: path.read_bytes() for path in sheet.iterdir()}
    options = ["--config", str(config), "--evaluation.resamples", "100", "--evaluation.sheet"]
    assert main([*options, "20"]) == 0
    assert main([*options, "19"]) == 1
    assert "has a sheet of other replies" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in sheet.iterdir()}


def test_judgements_are_read_back(config, sheet, key, tmp_path, capsys):
    """One judge in JSON who prefers the adapter, one in CSV who agrees but for two ties and skips an item."""
    choices = favour(key, "adapter")
    saved = {"sheet": key["sheet"], "judge": "ann", "choices": choices}
    (tmp_path / "ann.json").write_text(json.dumps(saved), encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO((sheet / "sheet.csv").read_text(encoding="utf-8"))))
    for row, choice in zip(rows, ["", "tie", " Tie", *list(choices.values())[3:]], strict=True):
        row["choice"] = choice
    with open(tmp_path / "bob.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=";")  # as spreadsheets save it where a comma is decimal
        writer.writeheader()
        writer.writerows(rows)
    files = [str(tmp_path / name) for name in ("ann.json", "bob.csv")]
    assert main(["--config", str(config), "--evaluation.resamples", "100", "--evaluation.judgements", *files]) == 0
    found = read_metrics(config)["judgements"]
    assert (found["judges"], found["items"], found["ties"]) == (["ann", "bob"], 20, 2)
    assert found["wins"] == {"adapter": 37, "base": 0}
    dialogues = found["dialogues_won"]["adapter"]
    assert found["dialogues_won"]["base"] == 0 and found["p_value"] == 2 / 2**dialogues
    assert 0 < found["alpha"] < 1
    assert all(-1 <= tau <= 1 for tau in found["correlations"].values()) and "f1" in found["correlations"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 judges preferred adapter 37 times and base 0 times in 20 pairs, with 2 ties" in printed
    assert "Krippendorff's alpha" in printed
    (tmp_path / "again.json").write_text(json.dumps(saved | {"choices": {"3": "left"}}), encoding="utf-8")
    again = [*files, str(tmp_path / "again.json")]
    assert main(["--config", str(config), "--evaluation.resamples", "100", "--evaluation.judgements", *again]) == 1
    assert "again.json has item 3 by 'ann', who judges it in" in capsys.readouterr().err
    both = (tmp_path / "bob.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "bob.csv").write_text(both + both.partition("\n")[2], encoding="utf-8")
    assert main(["--config", str(config), "--evaluation.resamples", "100", "--evaluation.judgements", files[1]]) == 1
    assert "who judges it in" in capsys.readouterr().err, "two judges in one file, without names"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{", "neither what the sheet's page saves nor its CSV"),
        ("a.json", '{"sheet": "x", "judge": "a", "choices": {}}', "is of another sheet (x)"),
        ("a.json", '{"sheet": SHEET, "judge": "a", "choices": {"99": "tie"}}', "judges item '99', which the sheet"),
        ("a.json", '{"sheet": SHEET, "judge": "a", "choices": {"1": "both"}}', "expected left, right or tie, found 'both'"),
        ("a.csv", "item,choice\n1,left\n", "neither what the sheet's page saves nor its CSV"),
        ("a.json", '{"sheet": SHEET, "judge": "a", "choices": {}}', "a.json has no choice yet"),
        ("none.json", None, "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_are_no_judgements_are_refused(config, key, tmp_path, capsys, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content.replace("SHEET", json.dumps(key["sheet"])), encoding="utf-8")
    assert main(["--config", str(config), "--evaluation.judgements", str(tmp_path / name)]) == 1
    assert says in capsys.readouterr().err


def test_judgements_need_a_sheet_and_a_sheet_two_systems_that_differ(tmp_path, capsys):
    config = make_run(tmp_path)
    only = ["--evaluation.generations", str(tmp_path / "run" / "generations" / "test.base.jsonl")]
    for options, says in (
        (["--evaluation.judgements", "a.json"], "key.json, which evaluation.sheet writes"),
        ([*only, "--evaluation.sheet", "3"], "compares two systems, and only one is scored"),
    ):
        assert main(["--config", str(config), "--evaluation.resamples", "100", *options]) == 1
        assert says in capsys.readouterr().err


def test_sign_test_and_rank_correlation_by_definition():
    for first, second in product(range(5), repeat=2):
        count = first + second
        extreme = [k for k in range(count + 1) if abs(2 * k - count) >= abs(first - second)]
        assert sign_test(first, second) == pytest.approx(sum(math.comb(count, k) for k in extreme) / 2**count)
    x, y = np.array([1.0, 2, 3, 3]), np.array([1.0, 3, 2, 2])
    assert kendall(x, x) == pytest.approx(1) and kendall(x, -x) == pytest.approx(-1)
    assert kendall(x, y) == pytest.approx((3 - 2) / 5)  # of five pairs without a tie, three agree
    assert math.isnan(kendall(x, np.ones(4)))


def test_the_page_is_filled_by_keys_and_saved(sheet, key):
    from selenium.webdriver.common.action_chains import ActionChains

    with chromium() as browser:
        browser.get((sheet / "sheet.html").as_uri())
        browser.execute_script("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
        ActionChains(browser).send_keys("1", "2", "3", "1").perform()
        assert browser.find_element("id", "count").text == "4 of 20 judged"
        browser.find_element("id", "judge").send_keys("Zoë 1")
        browser.find_element("css selector", "button").click()
        saved = json.loads(browser.execute_async_script("saved.text().then(arguments[0])"))
        first = dict(zip(list(key["items"])[:4], ("left", "tie", "right", "left"), strict=True))
        assert saved == {"sheet": key["sheet"], "judge": "Zoë 1", "choices": first}
        browser.set_window_size(400, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
