"""A local server with the endpoints of the Hugging Face hub that huggingface_hub uses."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

Files = dict[str, bytes]


class HubServer:
    """Repositories in memory; revisions are names of branches or commits."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        """By repository and revision."""
        self.tokens: list[str] = []
        """Authorizations of uploads."""
        self.endpoint = ""

    def add_folder(self, repo: str, revision: str, folder: Path) -> str:
        """Store a folder as a revision and return its commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos.setdefault(repo, {})[revision] = files
        return commit_of(repo, revision, files)

    def find(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """Return the commit and the files of a branch or commit."""
        for name, files in self.repos.get(repo, {}).items():
            commit = commit_of(repo, name, files)
            if revision in (name, commit):
                return commit, files
        return None

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serve on loopback; yields the endpoint."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self.endpoint
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def commit_of(repo: str, revision: str, files: Files) -> str:
    """Return 40 hex digits that identify the content of a revision."""
    listed = [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(files.items())]
    return hashlib.sha1(json.dumps([repo, revision, listed]).encode()).hexdigest()


def run_online(code: str, server: HubServer, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process for which the server is the hub (huggingface_hub reads variables when imported)."""
    variables = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    variables |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(cache.parent), "HF_HUB_CACHE": str(cache)}
    variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=False)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/revision/(.+)", path):
            self._send_info(*match.groups())
        elif match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/(.+)", path):
            self._send_tree(*match.groups())
        elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(*match.groups(), body=body)
        else:
            self._send(404, {"error": f"not served: {path}"})

    def _send_info(self, repo: str, revision: str) -> None:
        found = self.hub.find(repo, revision)
        if found is None:
            self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in found[1]]
            self._send(200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings})

    def _send_tree(self, repo: str, revision: str) -> None:
        found = self.hub.find(repo, revision)
        if found is None:
            self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in found[1].items()
            ]
            self._send(200, entries)

    def _send_file(self, repo: str, revision: str, name: str, body: bool) -> None:
        found = self.hub.find(repo, revision)
        if found is None:
            self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        elif name not in found[1]:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = found[1][name]
            headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(200, content, headers, body=body)

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not (token := self.headers.get("Authorization", "").removeprefix("Bearer ")):
            self._send(401, {"error": "Invalid username or password."})
            return
        self.hub.tokens.append(token)
        kinds = r"/api/(models|datasets)/([^/]+/[^/]+)"
        if path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            request = json.loads(raw)
            repo = f"{request['organization']}/{request['name']}"
            self.hub.repos.setdefault(repo, {"main": {}})
            self._send(200, {"url": f"{self.hub.endpoint}/{repo}"})
        elif match := re.fullmatch(kinds + r"/branch/(.+)", path):
            self.hub.repos[match[2]].setdefault(match[3], {})
            self._send(200, {})
        elif re.fullmatch(kinds + r"/preupload/(.+)", path):
            names = [entry["path"] for entry in json.loads(raw)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            self._send(200, {"files": files})
        elif match := re.fullmatch(kinds + r"/commit/(.+)", path):
            lines = [json.loads(line) for line in raw.splitlines()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            files = self.hub.repos[match[2]].setdefault(match[3], {})
            files |= added
            commit = commit_of(match[2], match[3], files)
            self._send(
                200,
                {"success": True, "commitUrl": f"{self.hub.endpoint}/{match[2]}/commit/{commit}", "commitOid": commit},
            )
        else:
            self._send(404, {"error": f"not served: {path}"})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None, body: bool = True) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(raw)
