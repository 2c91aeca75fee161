"""A Hub that drops, truncates, refuses, stalls or sends elsewhere: one sentence, and the next call goes on.

All days pass at the same time, in the threads of one process, because the client waits long before it tries again.
"""

from __future__ import annotations

from pathlib import Path

from experiment import Experiment
from hub_state import TOKEN, USER, Fault, Hub
from publishing_runs import ROOT, run

PROGRAM = f"""
import sys, urllib.request, warnings
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {str(ROOT)!r})
from huggingface_hub.utils import logging
import kestrel.hub
from kestrel.adapter.source import download_adapter
from kestrel.errors import KestrelError
from kestrel.publishing.upload import check_access, upload
logging.set_verbosity_error()
kestrel.hub.SILENCE = 1.0

def down(name):
    return "downloaded " + str(len((download_adapter(name) / "adapter_model.safetensors").read_bytes()))

def up(name):
    check_access(name, True)
    upload(name, True, {{"adapter_model.safetensors": name.encode() * 1000, "manifest.json": b"{{}}"}})
    return "uploaded"

def day(name):
    does = up if name.startswith("{USER}/") else down
    said = []
    for attempt in range(2):
        try:
            said.append(does(name))
        except KestrelError as error:
            said.append(str(error).replace(chr(10), " "))
        except Exception as error:
            said.append("UNEXPECTED " + repr(error).replace(chr(10), " "))
        urllib.request.urlopen(urllib.request.Request("HUB/heal/" + name, data=b"", method="POST"))
    return name + "|" + "|".join(said)

with ThreadPoolExecutor(32) as pool:
    print("DAYS", *pool.map(day, sys.argv[1:]), sep="\\n")
"""
HOWS = ["stall", "drop", "truncate", "redirect", 401, 403, 404, 409, 416, 429, 500]
# Of each kind of request: its pattern, and what the repository is called.
DOWN = {"info": "GET /api/models/someone/{}$", "file": "(GET|HEAD) /someone/{}/resolve/main/adapter_config"}
UP = {
    "commit": "POST /api/models/tester/{}/commit",
    "batch": "POST /tester/{}.git/info/lfs",
    "look": "GET /api/models/tester/{}$",
}


def test_a_bad_day_ends_with_one_sentence_and_the_next_call_goes_on(
    trained: Experiment, hub: Hub, tmp_path: Path
) -> None:
    files = {
        name: (trained.run / "adapter" / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    names = []
    for owner, kinds in (("someone", DOWN), (USER, UP)):
        for kind, pattern in kinds.items():
            for how in HOWS[kind == "file" :]:  # a file that stalls is the client's own affair: it tries for minutes
                name = f"{kind}-{how}"
                names.append(f"{owner}/{name}")
                hub.faults.append(Fault(pattern.format(name), how))
                if owner == "someone":
                    hub.add(f"someone/{name}", files)
                elif kind == "look":
                    hub.add(f"{USER}/{name}", {"README.md": b""}, private=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("HUB", hub.endpoint))
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = run(str(program), *names, hub=hub, home=tmp_path / "home", **patience)
    assert TOKEN not in done.said and "Traceback" not in done.said, done.said
    days = dict(line.split("|", 1) for line in done.said.partition("DAYS\n")[2].splitlines())
    assert days.keys() == set(names), done.said
    for name, said in days.items():
        first, second = said.split("|")
        assert second.startswith("uploaded" if name.startswith(USER) else "downloaded"), (name, said)
        if not first.startswith(("uploaded", "downloaded")):
            assert "UNEXPECTED" not in first and len(first) < 400, (name, first)
            assert name in first and any(word in first for word in ("again", "token", "no such", "lacks", "reached")), (
                first
            )
    hub.wrong[:] = [wrong for wrong in hub.wrong if "another host" in wrong]  # the others come of redirects
