"""Whatever is printed, by whomever, no terminal acts on it."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

from children import python
from hypothesis import given
from hypothesis import strategies as st

from kestrel.runtime.output import json_visible, visible

ROOT = Path(__file__).resolve().parents[2]
# Clearing the screen, a title, a link (OSC 8), the clipboard (OSC 52), the same with C1 controls, an override.
HOSTILE = "\x1b[2J \x1b]0;owned\a \x1b]8;;http://x\x1b\\ \x1b]52;c;aGk=\a \x9b2J \x9d52;c;aGk=\x9c \x85 \r\b\x7f\u202e\u2066\u2028"
HARMLESS = "größer\tçà 猫\u3000犬 می\u200cخواهم 👩\u200d🚀 \u200fעברית\n"


def acted_on(text: str) -> set[str]:
    """Characters of a text that change what a terminal does or in which order it shows the rest."""
    overrides = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    controls = {c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t"}
    return controls | {c for c in text if unicodedata.bidirectional(c) in overrides}


@given(st.text(max_size=100))
def test_visible_text_has_no_control_characters(text: str) -> None:
    assert not acted_on(visible(text))
    assert visible(visible(text)) == visible(text)
    assert visible(HARMLESS) == HARMLESS and visible("\x1b\x9b\u202e") == r"\x1b\x9b\u202e"
    line = json.dumps({text: [text]}, ensure_ascii=False)
    assert not acted_on(json_visible(line)) and json.loads(json_visible(line)) == {text: [text]}


def test_no_way_of_printing_reaches_the_terminal(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\ndata:\n  source: s\nmodel:\n  name: m\n")
    code = (
        "import logging, sys, warnings\nfrom kestrel.runtime.command_line import run_script\n"
        "from kestrel.runtime.output import write_to_stderr\nfrom tqdm import tqdm\n"
        f"bad, good = {HOSTILE!r}, {HARMLESS!r}\n"
        "def steps(settings, options):\n"
        "    print(bad, good); print('begun', bad, file=sys.stderr); sys.stdout.writelines([bad, good])\n"
        "    logging.getLogger(bad).error(bad); warnings.warn(bad); write_to_stderr(bad)\n"
        "    print(tqdm([1], desc=bad).close(), file=sys.stderr)\n"
        "    raise ValueError(bad)\n"
        f"raise SystemExit(run_script('x.py', 'X.', steps, ['--config', {str(config)!r}, '--debug']))"
    )
    done = python("-c", code, PYTHONIOENCODING="utf-8")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert (
        HARMLESS in done.stdout
        and r"\x1b]52;c;aGk=" in done.stdout
        and r"unexpected ValueError: \x1b[2J" in done.stderr
    )
    assert not acted_on(done.stdout) and not acted_on(done.stderr)


def test_nothing_writes_past_the_streams_that_make_text_visible() -> None:
    past = re.compile(
        r"os\.write\b|\bsteer\b|TextIOWrapper\.write|sys\.__std\w+|std\w+\.buffer|/dev/(?:tty|std)|os\.system"
    )
    found = {
        path.relative_to(ROOT).as_posix(): set(past.findall(path.read_text(encoding="utf-8")))
        for path in (*ROOT.glob("*.py"), *(ROOT / "kestrel").rglob("*.py"))
    }
    assert {path: names for path, names in found.items() if names} == {
        "kestrel/interrupts.py": {"os.write"},  # a constant
        "kestrel/runtime/output.py": {"os.write", "steer", "TextIOWrapper.write"},
        "kestrel/data/dataset.py": {"steer"},  # colours of --show
        "kestrel/chat/view.py": {"steer"},  # answers that are drawn over
    }
