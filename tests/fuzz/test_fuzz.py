"""Damaged and random input for every reader: the fuzzer's and hypothesis's; only Kestrel's errors may come out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).resolve().parent
sys.path.append(str(FUZZ))

import targets
from make_corpora import LAYOUTS
from mutate import mutate

# Inputs that the fuzzer kept, and a sound specimen of each corpus format.
SEEDS = {
    target: [path.read_bytes() for path in sorted((FUZZ / "corpus" / target).glob("*"))] for target in targets.TARGETS
}
for format, specimen in LAYOUTS.items():
    SEEDS[format].append(specimen.encode())
# The same inputs every time: what is new is the fuzzer's to find, `make fuzz`.
few = settings(derandomize=True, max_examples=90, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("target", targets.TARGETS)
def test_kept_inputs(target):
    """Of each kind of input, one at least is accepted: a reader that refuses everything would prove nothing."""
    accepted = [targets.try_input(target, data) for data in SEEDS[target]]
    assert any(accepted)


def flip(data: bytes, position: int, bit: int) -> bytes:
    """One bit changed."""
    at = position % len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@pytest.mark.parametrize("target", targets.TARGETS)
@few
@given(st.data())
def test_damaged_and_random_inputs(target, data):
    """A bit flipped, an end cut off, or values exchanged in an input that was sound; or any bytes."""
    sound = data.draw(st.sampled_from(SEEDS[target]))
    kind = data.draw(st.integers(-2, 3))
    if kind < 0:
        text = st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
        damaged = data.draw(st.binary(max_size=200) | text)
    elif kind == 0:
        damaged = flip(sound, data.draw(st.integers(0, 2**20)), data.draw(st.integers(0, 7)))
    elif kind == 1:
        damaged = sound[: data.draw(st.integers(0, len(sound)))]
    else:
        seed = data.draw(st.integers(0, 2**32))
        damaged = mutate(sound, 4096, seed, lambda part, limit: flip(part or b"x", seed, seed % 8)[:limit])
    targets.try_input(target, damaged)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@few
@given(st.dictionaries(st.sampled_from(["dialogue_id", "turn", "reference", "response", "history", "x"]), _json))
def test_generation_rows_of_any_json(row):
    line = json.dumps({"reference": "a", "response": "b", **row}).encode()
    targets.try_input("generations", line)
    targets.try_input("evaluation", line + b"\n" + line)


def whole_partial() -> bytes:
    """What generate.py has written after three shards, without the header."""
    from kestrel.generation.answers import _mark

    content = ""
    for done in (32, 40, 64):
        shard = "".join(json.dumps({"dialogue_id": f"d{done}-{i}", "response": "é\u2028 yes"}) + "\n" for i in range(3))
        content += shard + _mark(done, shard.encode())
    return content.encode()


@settings(few, max_examples=200)
@given(st.integers(0, 2**20), st.integers(0, 7), st.booleans())
def test_a_damaged_partial_file_is_continued_from_before_the_damage(position, bit, cut):
    from kestrel.generation.answers import _keep_complete_shards

    sound = whole_partial()
    at = position % len(sound)
    damaged = sound[:at] if cut else flip(sound, at, bit)
    header = json.dumps({"identity": "i", "dialogues": 64}).encode() + b"\n"
    path = targets.folder() / ".test.adapter.jsonl.partial"
    for content, expected in ((sound, 64), (damaged, None)):
        path.write_bytes(header + content)
        done = _keep_complete_shards(path, "i", range(64))
        kept = path.read_bytes().removeprefix(header)
        assert sound.startswith(kept), "rows that nobody wrote"
        if expected:
            assert (done, kept) == (expected, sound)
        else:
            assert done in (0, 32, 40) and len(kept) <= at


def test_what_fuzzing_found_is_on_record():
    """docs/reliability.md quotes these; each finished run was clean."""
    runs = json.loads((FUZZ / "results.json").read_text(encoding="utf-8"))["runs"]
    assert sum(run["inputs"] for run in runs) >= 1_000_000
    assert all(run["clean"] for run in runs)
    assert {run["target"] for run in runs} <= set(targets.TARGETS)
