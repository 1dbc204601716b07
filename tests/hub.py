"""A small stand-in for the hub: the calls of huggingface_hub's upload, and a memory of what came."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """`trees` has what was committed, by repository and branch; large files travel apart and lie in `store`."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.trees: dict[tuple[str, str], dict[str, bytes]] = {}
        self.store: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.commits: list[dict[str, Any]] = []
        self.uploaded = 0  # bytes, in whichever way
        self.fails: dict[str, int] = {}  # a piece of a path -> the status that it gets
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        for piece, status in self.fails.items():
            if piece in path:
                return status, {"error": "as the test wants it"}
        if method == "PUT":
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.store[oid], self.uploaded = body, self.uploaded + len(body)
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self.place(entry) for entry in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|branch|preupload|commit)/([^/]+))?", path)
        assert found, (method, path)
        repository, what, branch = found[1], found[2] or "revision", found[3] or "main"
        if repository not in self.private:
            return 404, {"error": "Repository not found"}
        return getattr(self, what)(repository, branch, body)

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in self.private:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repository}"}
        self.private[repository] = asked.get("visibility") == "private"
        self.trees[repository, "main"] = {".gitattributes": b""}
        return 200, {"url": f"{self.url}/{repository}", "name": repository}

    def place(self, entry: dict[str, Any]) -> dict[str, Any]:
        known = entry["oid"] in self.store
        return entry if known else entry | {"actions": {"upload": {"href": f"{self.url}/store/{entry['oid']}"}}}

    def revision(self, repository: str, branch: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if (repository, branch) not in self.trees:
            return 404, {"error": "Revision not found"}
        files = [{"rfilename": name} for name in self.trees[repository, branch]]
        return 200, {"id": repository, "private": self.private[repository], "sha": "0" * 40, "siblings": files}

    def branch(self, repository: str, branch: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if (repository, branch) in self.trees:
            return 409, {"error": "Reference already exists"}
        self.trees[repository, branch] = dict(self.trees[repository, "main"])
        return 200, {}

    def preupload(self, repository: str, branch: str, body: bytes) -> tuple[int, dict[str, Any]]:
        found = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            held = self.trees[repository, branch].get(file["path"])
            framed = b"" if held is None else b"blob %d\0%s" % (len(held), held)
            oid = hashlib.sha256(held or b"").hexdigest() if large else hashlib.sha1(framed).hexdigest()
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            found.append({"path": file["path"], **mode, **({} if held is None else {"oid": oid})})
        return 200, {"files": found}

    def commit(self, repository: str, branch: str, body: bytes) -> tuple[int, dict[str, Any]]:
        tree = self.trees[repository, branch]
        header, *operations = (json.loads(line) for line in body.splitlines())
        self.commits.append(header["value"])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
                self.uploaded += len(tree[value["path"]])
            elif operation["key"] == "lfsFile":
                tree[value["path"]] = self.store[value["oid"]]
            else:
                del tree[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40}


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            path = self.path.partition("?")[0]
            body = self.chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rest()
            hub.calls.append((self.command, path))
            if re.match(r"/api/(repos|models)/|/[^/]+/[^/]+\.git/", path):  # storage does without
                hub.tokens.add(self.headers.get("Authorization"))
            status, answer = hub.answer(self.command, path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def rest(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = serve

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
