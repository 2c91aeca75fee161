"""A Hugging Face Hub on loopback, strict: what its client (huggingface_hub 2.4) may not ask is an error that tests see.

Models, and data sets to be read; one user, everything in memory. Large files go by LFS (batch, PUT, verify) and come whole by
a redirect; xet must be switched off in the client (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from hub_state import TOKEN, USER, Fault, Hub, Repository, git_oid, sha256

_LFS = (".safetensors", ".bin", ".pt")
_ID, _REVISION = r"(?P<id>[\w.-]+/[\w.-]+)", "(?P<revision>[^/]+)"


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    ROUTES = (
        (r"HEAD /|GET /api/agent-harnesses", "nothing"),
        (r"GET /api/whoami-v2", "whoami"),
        (r"POST /heal/(?P<of>.+)", "heal"),
        (r"(GET|HEAD) /elsewhere", "nothing"),
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate"),
        (rf"GET /api/(?P<kind>models|datasets)/{_ID}(/revision/{_REVISION})?", "info"),
        (rf"GET /api/(?:models|datasets)/{_ID}/tree/{_REVISION}(?P<under>/.+)?", "tree"),
        (rf"POST /api/models/{_ID}/preupload/{_REVISION}", "preupload"),
        (rf"POST /api/models/{_ID}/commit/{_REVISION}", "commit"),
        (rf"POST /{_ID}\.git/info/lfs/objects/batch", "batch"),
        (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", "upload"),
        (r"POST /lfs/verify", "verify"),
        (r"(GET|HEAD) /cdn/(?P<oid>[0-9a-f]{64})", "download"),
        (rf"(GET|HEAD) (?:/datasets)?/{_ID}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    )

    def handle_any(self) -> None:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.hub.requests.append(request)
        if self.headers.get("Host", "").startswith("localhost") and "Authorization" in self.headers:
            self.hub.wrong.append(f"the token went to another host with {request}")
        for fault in self.hub.faults:
            if fault.times and re.search(fault.requests, request):
                fault.times -= 1
                self.fail(fault)
                return
        for pattern, name in self.ROUTES:
            if match := re.fullmatch(pattern, request):
                try:
                    getattr(self, name)(**match.groupdict())
                except Refused as refusal:
                    if refusal.status == 400:
                        self.hub.wrong.append(f"{request}: {refusal.message}")
                    headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                    self.answer({"error": refusal.message}, refusal.status, headers)
                return
        self.hub.wrong.append(request)
        self.nothing()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def stall(self) -> None:
        """Keeps large files waiting, as long as they are to."""
        while self.hub.stalled:
            self.hub.waiting.set()
            time.sleep(0.05)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # who asked may have been stopped
                self.wfile.write(data)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require(self, condition: bool, message: str, status: int = 400) -> None:
        if not condition:
            raise Refused(status, "", message)

    def repository(self, name: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if write:
            self.require(self.known, "Invalid username or password.", 401)
            self.require(name.startswith(f"{USER}/"), "You have no write access", 403)
        if found is None or (found.private and not self.known):
            raise Refused(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return found

    def at(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repository.head if revision == "main" else revision
        if oid not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def fail(self, fault: Fault) -> None:
        """Answers as on a bad day."""
        self.body()
        if isinstance(fault.how, int):
            headers = {"Retry-After": "1", "X-Error-Message": f"a bad day ({fault.how})"}
            self.answer({"error": "a bad day"}, fault.how, headers)
            return
        if fault.how == "redirect":
            self.answer(b"", 302, {"Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/elsewhere"})
            return
        if fault.how == "truncate":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: "x"\r\n\r\n{')
        until = time.monotonic() + 600
        while fault.how == "stall" and fault.times and time.monotonic() < until:
            time.sleep(0.05)
        self.close_connection = True
        self.connection.close()

    # -- endpoints -----------------------------------------------------------------------------------------------------

    def nothing(self) -> None:
        """For requests of which only the fact that somebody answers matters, and for wrong ones."""
        self.answer({"error": "no such endpoint"}, 404)

    def whoami(self) -> None:
        self.require(self.known, "Invalid username or password.", 401)
        self.answer({"type": "user", "name": USER, "auth": {"type": "access_token"}, "orgs": []})

    def heal(self, of: str) -> None:
        for fault in self.hub.faults:
            if of in fault.requests:
                fault.times = 0
        self.answer({})

    def create(self) -> None:
        asked = json.loads(self.body())
        self.require(self.known, "Invalid username or password.", 401)
        self.require(asked.get("type", "model") == "model" and bool(asked["name"]), f"unexpected {asked}")
        self.require(asked["organization"] in (None, USER), "You don't have the rights to create it", 403)
        name = f"{USER}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        exists = name in self.hub.repositories
        if not exists:
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"{self.hub.endpoint}/{name}"}, 409 if exists else 200)

    def validate(self) -> None:
        asked = json.loads(self.body())
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        self.require(asked["repoType"] == "model" and match is not None, "no metadata")
        data = yaml.safe_load(match[1]) if match else {}
        for key in ("license", "library_name"):
            self.require(isinstance(data.get(key, ""), str), f"{key} must be text")
        for result in (result for entry in data.get("model-index", []) for result in entry["results"]):
            self.require("type" in result["task"], "a result needs task.type")
            self.require({"type", "name"} <= result["dataset"].keys(), "a result needs dataset.type and name")
            self.require(all({"type", "value"} <= m.keys() for m in result["metrics"]), "a metric needs type and value")
        refused = self.hub.refused_metadata
        self.answer({"errors": [{"message": refused}] if refused else [], "warnings": []}, 400 if refused else 200)

    def info(self, kind: str, id: str, revision: str | None) -> None:
        repository = Repository(False, {"0" * 40: {}}) if id in self.hub.datasets else self.repository(id)
        oid, files = self.at(repository, revision or "main")
        siblings = [{"rfilename": name} for name in sorted(files)]
        self.answer({"id": id, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, id: str, revision: str, under: str | None) -> None:
        _, files = self.at(self.repository(id), revision)
        if under:
            raise Refused(404, "EntryNotFound", f"{under} does not exist")
        entries = []
        for name, data in files.items():
            lfs = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if name.endswith(_LFS) else {}
            entries.append({"type": "file", "path": name, "size": len(data), "oid": git_oid(data), **lfs})
        self.answer(entries)

    def preupload(self, id: str, revision: str) -> None:
        asked = json.loads(self.body())
        _, files = self.at(self.repository(id, write=True), revision)
        answers = []
        for file in asked["files"]:
            self.require(file.keys() == {"path", "sample", "size"}, f"unexpected {file.keys()}")
            is_lfs, there = file["path"].endswith(_LFS), files.get(file["path"])
            oid = None if there is None else sha256(there) if is_lfs else git_oid(there)
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def batch(self, id: str) -> None:
        asked = json.loads(self.body())
        self.repository(id, write=True)
        self.require(asked["operation"] == "upload" and asked["hash_algo"] == "sha256", f"unexpected {asked}")
        self.require("basic" in asked["transfers"], "no basic transfer")
        answers = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            answers.append(answer)
        self.answer({"transfer": "basic", "objects": answers})

    def upload(self, oid: str) -> None:
        if self.hub.dropped_uploads:
            self.hub.dropped_uploads -= 1
            self.rfile.read(64)
            self.close_connection = True
            self.connection.close()
            return
        self.require("Authorization" not in self.headers, "the token went to the storage")
        content = self.body()
        self.stall()
        self.require(sha256(content) == oid, "the content is not what was announced")
        self.hub.objects[oid] = content
        self.hub.uploaded.append(oid)
        self.answer(b"")

    def verify(self) -> None:
        asked = json.loads(self.body())
        self.require(len(self.hub.objects.get(asked["oid"], b"")) == asked["size"], "not there")
        self.answer({})

    def commit(self, id: str, revision: str) -> None:
        repository = self.repository(id, write=True)
        self.require(self.headers["Content-Type"] == "application/x-ndjson", "commits are ndjson")
        header, *operations = [json.loads(line) for line in self.body().splitlines()]
        if self.hub.failing_commits:
            self.hub.failing_commits -= 1
            raise Refused(503, "", "Service Unavailable")
        self.require(header["key"] == "header" and bool(header["value"]["summary"]), "a commit begins with its header")
        self.require(header["value"].get("parentCommit", repository.head) == repository.head, "not on top", 412)
        self.require(revision == "main" and bool(operations), "an empty commit")
        files = dict(repository.files)
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "file":
                self.require(not path.endswith(_LFS), f"{path} belongs into LFS")
                files[path] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.require(value["oid"] in self.hub.objects, f"{path} was not uploaded")
                files[path] = self.hub.objects[value["oid"]]
            else:
                self.require(operation["key"] == "deletedFile" and path in files, f"unexpected {operation['key']}")
                del files[path]
        oid = repository.commit(files)
        url = f"{self.hub.endpoint}/{id}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, id: str, revision: str, path: str) -> None:
        oid, files = self.at(self.repository(id), revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content, common = files[path], {"X-Repo-Commit": oid}
        if not path.endswith(_LFS):
            self.answer(content, headers={**common, "ETag": f'"{git_oid(content)}"'})
            return
        digest = sha256(content)
        self.hub.objects[digest] = content
        storage = self.hub.endpoint.replace("127.0.0.1", "localhost")  # another host, as the Hub's storage is
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.answer(b"", 302, {**common, **linked, "Location": f"{storage}/cdn/{digest}"})

    def download(self, oid: str) -> None:
        self.stall()
        self.answer(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that listens while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
