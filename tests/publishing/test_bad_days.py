"""A Hub that drops, truncates, refuses, stalls or sends elsewhere: one sentence, and the next call goes on.

Most days pass at the same time, in the threads of one process, because the client waits long before it tries again. Days on
which nothing is answered come after them, one by one: a Hub that is silent is not asked again by a process.
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
from huggingface_hub import constants, file_download
from huggingface_hub.utils import logging, _http
import kestrel.hub
from kestrel.adapter.source import download_adapter
from kestrel.config.settings import Model
from kestrel.data.locate import locate
from kestrel.errors import KestrelError
from kestrel.prompt.tokenizer import load_tokenizer
from kestrel.publishing.upload import base_config, check_access, upload
logging.set_verbosity_error()

def down(name):
    if name.startswith("someone/config"):
        return "downloaded " + base_config(name, None)["model_type"]
    if name.startswith("someone/tokenizer"):
        return "downloaded " + str(len(load_tokenizer(Model(name=name))))
    if name.startswith("someone/data"):
        return "downloaded " + str(locate(name, None).hub_commit)
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
        urllib.request.urlopen(urllib.request.Request("ENDPOINT/heal/" + name, data=b"", method="POST"))
        constants.HF_HUB_OFFLINE = False
    return name + "|" + "|".join(said)

silent = [name for name in sys.argv[1:] if name.endswith("stall")]
with ThreadPoolExecutor(32) as pool:
    print("DAYS", *pool.map(day, [name for name in sys.argv[1:] if name not in silent]), sep="\\n")
kestrel.hub.SILENCE = constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.5
file_download._ETAG_RETRY_TIMEOUT = 0.5
_http.time.sleep = lambda seconds: None
print(*map(day, silent), sep="\\n")
"""
HOWS = ["stall", "drop", "truncate", "redirect", 401, 403, 404, 409, 416, 429, 500]
SAID = ("again", "token", "no such", "lacks", "reached", "does not answer", "could not be downloaded")
# Of each kind of request: its pattern, and what the repository is called.
DOWN = {"info": "GET /api/models/someone/{}$", "file": "(GET|HEAD) /someone/{}/resolve/main/adapter_config"}
SILENT = {
    "config": "(GET|HEAD) /someone/{}/resolve/main/config",
    "tokenizer": "(GET|HEAD) /someone/{}/resolve/",
    "data": "GET /api/datasets/someone/{}",
}
UP = {
    "commit": "POST /api/models/tester/{}/commit",
    "batch": "POST /tester/{}.git/info/lfs",
    "look": "GET /api/models/tester/{}$",
}


def test_a_bad_day_ends_with_one_sentence_and_the_next_call_goes_on(
    trained: Experiment, hub: Hub, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in trained.base.iterdir()}
    adapter = trained.run / "adapter"
    files |= {path.name: path.read_bytes() for path in adapter.glob("adapter_*")}
    names = []
    for owner, kinds in (("someone", DOWN), ("someone", SILENT), (USER, UP)):
        for kind, pattern in kinds.items():
            for how in HOWS if kinds is not SILENT else ["stall"]:
                name = f"{kind}-{how}"
                names.append(f"{owner}/{name}")
                hub.faults.append(Fault(pattern.format(name), how))
                if owner == "someone":
                    hub.add(f"someone/{name}", {"data": {"train.jsonl": b"{}"}}.get(kind, files))
                elif kind == "look":
                    hub.add(f"{USER}/{name}", {"README.md": b""}, private=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("ENDPOINT", hub.endpoint))
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = run(str(program), *names, hub=hub, home=tmp_path / "home", **patience)
    assert TOKEN not in done.said and "Traceback" not in done.said, done.said
    days = dict(line.split("|", 1) for line in done.said.partition("DAYS\n")[2].splitlines() if "|" in line)
    assert days.keys() == set(names), done.said
    for name, said in days.items():
        first, second = said.split("|")
        assert second.startswith("uploaded" if name.startswith(USER) else "downloaded"), (name, said)
        if not first.startswith(("uploaded", "downloaded")):
            assert "UNEXPECTED" not in first and len(first) < 450, (name, first)
            assert name in first and any(word in first for word in SAID), first
    hub.wrong[:] = [wrong for wrong in hub.wrong if "another host" in wrong]  # the others come of redirects
