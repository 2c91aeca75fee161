"""Several processes give what one gives, in order; whatever ends, ends together."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make_tokenizers as make
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kestrel.data import cores, reading
from kestrel.data.cores import in_order, processes_for
from kestrel.data.corpus import Tally, open_corpus
from kestrel.data.dataset import write_split
from kestrel.data.reading import Reading
from kestrel.data.splits import Splitter
from kestrel.data.spool import dialogues_of
from kestrel.errors import KestrelError
from kestrel.prompt.prompt import Prompt

ROOT = Path(__file__).resolve().parents[2]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(items=st.lists(st.integers(), max_size=60), processes=st.integers(1, 4))
def test_the_results_in_the_order_of_the_items(items: list[int], processes: int) -> None:
    other = 3

    def function(item: int) -> tuple[int, bytes]:
        time.sleep(item % 3 / 1000)
        return item * other, bytes(item % 300)

    assert list(in_order(function, items, processes)) == [function(item) for item in items]


@pytest.mark.parametrize("processes", [1, 2])
def test_few_items_are_taken_ahead(processes: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    for number, result in enumerate(in_order(lambda item: item, items(), processes), 1):
        assert result == number and taken <= number + 2 * processes


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_function_and_the_items_raise_is_raised(processes: int) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KestrelError("line 2 is broken")

    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [1, 2, 0, 3], processes))
    with pytest.raises(KestrelError, match="line 2 is broken"):
        list(in_order(lambda item: item, broken(), processes))


def test_nothing_runs_on_after_the_reader_has_left() -> None:
    results = in_order(lambda item: (item, os.getpid()), range(1000), 2)
    processes = {next(results)[1] for _ in range(20)}
    assert os.getpid() not in processes
    results.close()  # type: ignore[attr-defined]
    assert not any(map(alive, processes))


def test_a_process_that_is_killed_is_told() -> None:
    def function(item: int) -> int:
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(KestrelError, match="killed, as systems do when memory runs out"):
        list(in_order(function, range(100), 2))


@pytest.mark.parametrize("milliseconds", range(0, 60, 4))
def test_wherever_it_is_killed_nobody_waits_for_it(milliseconds: int) -> None:
    """Also in the middle of a message, which is longer than a pipe holds."""
    results = in_order(lambda item: (os.getpid(), bytes(2**22)), [bytes(2**21)] * 10**6, 2)
    victim = next(results)[0]
    killer = threading.Timer(milliseconds / 1000, os.kill, (victim, signal.SIGKILL))
    killer.start()
    with pytest.raises(KestrelError, match="killed, as systems do when memory runs out"):
        for _ in results:
            pass


def test_where_the_system_starts_no_process_this_one_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    assert set(in_order(lambda item: os.getpid(), range(100), 2)) == {os.getpid()}


def test_many_processes_only_for_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1 hi\thello\n")
    with large.open("wb") as file:
        file.truncate(2**30)
    assert (processes_for([small]), processes_for([small, large])) == (1, 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1))
    assert processes_for([large]) == 1


# -- preprocess.py's two passes ----------------------------------------------------------------------------------------

SAID = st.sampled_from(["hi", "how are you ?", "", "tabs\there", "__ SILENCE __", "Zoë 👍", "i like cars . " * 30])
TURN = st.fixed_dictionaries({"speaker": st.sampled_from(["self", "partner"]), "text": SAID})
RECORD = st.fixed_dictionaries(
    {
        "persona": st.lists(st.sampled_from(["i like cars .", "i have two dogs .", "i am tall .", ""]), max_size=3),
        "turns": st.lists(TURN, max_size=6),
    },
    optional={"partner_persona": st.lists(st.sampled_from(["i swim .", "i am tall ."]), max_size=2)},
)


def outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except KestrelError as error:
        return str(error)


@QUICK
@given(
    records=st.lists(RECORD, max_size=40),
    twice=st.none() | st.tuples(st.integers(0, 39), st.integers(0, 39)),
    broken=st.none() | st.integers(0, 39),
    a_piece=st.integers(1, 7),
)
def test_three_processes_read_and_render_what_one_does(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, Any]],
    twice: tuple[int, int] | None,
    broken: int | None,
    a_piece: int,
) -> None:
    """Dialogues, tallies, errors and the dataset's bytes, for sources that need repairs or are wrong."""
    folder = tmp_path_factory.mktemp("cores")
    lines = [json.dumps({"dialogue_id": f"d{number}", **record}) for number, record in enumerate(records)]
    if twice is not None and max(twice) < len(lines):
        lines[twice[1]] = json.dumps({"dialogue_id": f"d{twice[0]}", **records[twice[1]]})
    if broken is not None and broken < len(lines):
        lines[broken] = '{"dialogue_id": 1'
    source = folder / "data.jsonl"
    source.write_text("".join(f"{line}\n" for line in lines) or "\n", encoding="utf-8")

    def dataset(processes: int) -> dict[str, Any]:
        splitter = Splitter(open_corpus(str(source), "kestrel"), 0.2, 0.2, processes=processes)
        prompt = Prompt(make.falcon_like(), "plain", 120)
        found: dict[str, Any] = {}
        for split in splitter.splits:
            tally, target = Tally(), folder / f"{processes}" / split
            counts = outcome(
                lambda t=tally, f=target, s=split: write_split(splitter.batches(s), prompt, f, t, processes)
            )
            files = sorted(path for path in target.rglob("*") if path.is_file())
            found[split] = counts, tally, [(path.name, path.read_bytes()) for path in files]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_DRAFTS_A_PIECE", a_piece)
        assert outcome(lambda: dataset(3)) == outcome(lambda: dataset(1))


@pytest.mark.parametrize("processes", [1, 3])
def test_what_is_dropped_counts_for_the_dialogue_that_follows_in_another_piece_too(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_DRAFTS_A_PIECE", 2)
    said = [{"speaker": "partner", "text": "hi"}, {"speaker": "self", "text": "hi"}]
    kept, dropped = {"persona": ["i like cars ."], "turns": said}, {"persona": [], "turns": []}
    records = [*[dropped] * 5, kept, *[dropped] * 4, kept, kept, dropped]
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps({"dialogue_id": f"d{n}", **each}) + "\n" for n, each in enumerate(records)))
    read = Reading(open_corpus(str(source), "kestrel"), "train", 0, None, processes)
    (found,) = read.spool.read(np.arange(len(read.spool)), 1000)
    assert [since.read for _, since in dialogues_of(*found)] == [6, 5, 1] and read.rest.read == 1


# -- the script --------------------------------------------------------------------------------------------------------


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(process: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{process}/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of an experiment whose source is worth several processes."""
    folder = tmp_path_factory.mktemp("large")
    make.falcon_like().save_pretrained(str(folder / "base"))
    rng, words = random.Random(0), ["i", "like", "dogs", "cars", "two", "old", "books", "how", "are", "you", "?"]

    def say() -> str:
        return " ".join(rng.choices(words, k=12))

    with (folder / "train.txt").open("w") as file:
        while file.tell() < cores.WORTH_IT:
            said = [f"your persona: {say()}" for _ in range(4)] + [f"{say()}\t{say()}" for _ in range(8)]
            file.writelines(f"{number} {text}\n" for number, text in enumerate(said, 1))
    config = folder / "config.yaml"
    source, base = folder / "train.txt", folder / "base"
    config.write_text(f"run_dir: {folder}/run\ndata:\n  source: {source}\nmodel:\n  name: {base}\n")
    return config


def start(config: Path, run: Path, *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "preprocess.py", "--config", str(config), "--run_dir", str(run)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def dataset(run: Path) -> dict[str, bytes]:
    files = sorted(path for path in (run / "dataset").rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: preprocess.py starts no process")


@needs_two
def test_one_core_and_all_cores_write_the_same(large: Path, tmp_path: Path) -> None:
    one = start(large, tmp_path / "one", "taskset", "-c", str(min(os.sched_getaffinity(0))))
    helped = False
    while one.poll() is None:
        helped |= bool(helpers(one.pid))
        time.sleep(0.05)
    assert one.returncode == 0, one.communicate()
    assert not helped
    many = start(large, tmp_path / "many")
    assert wait_for_helpers(many) and many.wait() == 0, many.communicate()
    assert dataset(tmp_path / "many") == dataset(tmp_path / "one") != {}


@needs_two
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_a_script_that_is_stopped_leaves_no_process_and_no_lock(
    how: signal.Signals, large: Path, tmp_path: Path
) -> None:
    process = start(large, tmp_path / "run")
    helping = wait_for_helpers(process)
    assert helping
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how), said
    assert "Traceback" not in said
    again = start(large, tmp_path / "run")
    assert wait_for_helpers(again), again.communicate()  # nobody holds the folder
    again.terminate()
    assert again.wait(timeout=60) == 143
    assert not any(map(alive, helping))


@needs_two
def test_a_killed_helper_ends_the_script_with_what_to_do(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "run")
    os.kill(min(wait_for_helpers(process)), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "taskset" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()  # as it was


def helpers(process: int) -> set[int]:
    """Python processes that a script has forked; git, which it asks for the commit, is none."""
    found = set()
    for child in children(process):
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            continue
        if "preprocess.py" in command:
            found.add(child)
    return found


def wait_for_helpers(process: subprocess.Popen[str]) -> set[int]:
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if len(found := helpers(process.pid)) > 1:
            time.sleep(0.1)
            return found
        time.sleep(0.01)
    return set()
