"""A small Hugging Face hub on this machine: who you are, making a repository, commits. Files come inline."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What it was asked, and what it holds."""

    def __init__(self) -> None:
        self.role = "write"
        self.refuses_commits = False
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.address = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer to a request."""
        if path.endswith("/whoami-v2"):
            user = {"type": "user", "name": "ada", "orgs": [{"name": "lab"}]}
            return 200, {**user, "auth": {"accessToken": {"role": self.role}}}
        if path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            return 200, {"url": f"{self.address}/lab/switcher"}
        if path.endswith("/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if "/commit/" in path and not self.refuses_commits:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.address}/lab/switcher/commit/1", "commitOid": "1", "success": True}
        return 403, {"error": f"no {path} here"}


@contextmanager
def hub() -> Iterator[Hub]:
    """One that answers while the block works."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.tokens.add(self.headers.get("Authorization", ""))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, found = state.answer(self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
