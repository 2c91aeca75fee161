"""Verdicts tell apart what training did, and what to do next."""

import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from children import ROOT

from kestrel.evaluation.comparisons import paired_tests
from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import Choices
from kestrel.evaluation.resampling import Dialogues
from kestrel.evaluation.systems import Answered, System, score
from kestrel.evaluation.verdicts import verdicts

REFERENCES = [
    f"i have {n} dogs and my {word} likes them ." for n in range(4) for word in ("sister", "boss", "cat", "aunt")
]


def said(right: float, nll: float, dialogues: int = 16) -> list[Reply]:
    """Replies of which a share is right, with a likelihood of the reference that varies a little."""
    noise = np.resize([0.01, -0.01, 0.02, -0.02, 0.01], dialogues)
    return [
        Reply(
            f"d{i}", 1, gold, gold if i < right * dialogues else "no idea what you mean", 1, stopped_by="eos",
            response_tokens=4, reference_nll=10 * (nll + noise[i]), reference_tokens=10,
        )
        for i, gold in enumerate(REFERENCES[:dialogues])
    ]  # fmt: skip


def sentences(
    adapter: tuple[float, float], base: tuple[float, float], constant: str = "", dialogues: int = 16
) -> list[str]:
    rows = said(*adapter, dialogues)
    systems = {
        "adapter": System("system", "", rows), "base": System("base", "", said(*base, dialogues)),
        "constant_reply": System("trivial", "", Answered(rows, [constant or "hm"] * len(rows))),
    }  # fmt: skip
    units = Dialogues([row.dialogue_id for row in rows], 100, 0)
    score(systems, units, Choices())
    return verdicts(systems, paired_tests(systems, units), units.count)


@pytest.mark.parametrize(
    ("adapter", "base", "says"),
    [
        ((1.0, 1.0), (0.0, 3.0), "adapter beats base in BLEU"),
        ((1.0, 1.0), (0.0, 3.0), "adapter also predicts the references better than base (perplexity 2.7 against 20."),
        ((0.0, 1.0), (0.0, 3.0), "adapter learned (perplexity 2.7 against 20."),
        ((0.0, 1.0), (0.0, 3.0), "decoding or length hides it. Its replies are 0.5 times as long as the references, and 100%"),
        ((0.0, 3.0), (0.0, 3.0), "adapter did not learn what base does not know (perplexity 20."),
        ((1.0, 3.0), (0.0, 3.0), "adapter predicts the references no better than base"),
        ((0.0, 5.0), (0.0, 3.0), "adapter is WORSE than base at predicting the references (perplexity 14"),
        ((0.0, 3.0), (1.0, 3.0), "adapter is WORSE than base in BLEU"),
        ((0.0, 3.0), (0.0, 3.0), "adapter does NOT beat base in BLEU (+0.00, p = 1.000: not significant)"),
    ],
)  # fmt: skip
def test_what_training_did(adapter, base, says):
    found = sentences(adapter, base)
    assert any(says in sentence for sentence in found), found


def test_better_than_base_and_not_than_a_constant():
    found = sentences((0.5, 1.0), (0.0, 3.0), constant="i have dogs and my cat likes them .")
    assert any(sentence.startswith("adapter beats base in") for sentence in found)
    assert any(sentence.startswith("adapter does NOT beat the best trivial system in") for sentence in found)


def test_five_dialogues_give_no_verdict():
    (sentence,) = sentences((1.0, 1.0), (0.0, 3.0), dialogues=5)
    assert sentence.startswith("5 dialogues are too few to tell systems apart")


def test_what_got_worse_is_red_on_a_terminal():
    """Through a terminal of its own: the filter that shows control characters must let ours through, and no others."""
    program = (
        "from kestrel.evaluation import tables; from kestrel.runtime.output import prepare_output\n"
        "tables.all_tables = lambda _: []; prepare_output()\n"
        "verdicts = ['a\\x1b[2J is WORSE than b.', 'a beats c.']\n"
        "tables.print_summary({'signature': 's', 'systems': {}, 'verdicts': verdicts, 'notes': ['n']})\n"
    )
    expected = ["s", "", "{}a\\x1b[2J is WORSE than b.{}", "a beats c.", "", "Notes", "n", ""]
    primary, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=terminal, env=environment)
    os.close(terminal)
    assert os.read(primary, 10_000).decode().replace("\r", "") == "\n".join(expected).format("\033[31m", "\033[0m")
    os.close(primary)
