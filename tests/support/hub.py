"""A server on this machine that speaks the part of the Hugging Face hub's protocol that policies need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Repositories of models: for each the files of its branches, and the commits that were made.

    Attributes:
        files: content by repository, branch and path.
        requests: (method, path) of all requests.
        token: the token with write access.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []

    def sha(self, repository: str, branch: str) -> str:
        files = self.files[repository][branch]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def at(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch, or of the commit that a branch is at; None if there is neither."""
        branches = self.files.get(repository, {})
        return next((f for name, f in branches.items() if revision in (name, self.sha(repository, name))), None)


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def json(self, value: Any, status: int = 200, **headers: str) -> None:
            self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def do_POST(self) -> None:
            hub.requests.append((self.command, self.path))
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.json({"error": "Invalid username or password."}, 401)
            if self.path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.private.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
                status = 409 if name in hub.files else 200
                hub.files.setdefault(name, {"main": {}})
                return self.json({"url": f"http://{self.headers['Host']}/{name}"}, status)
            _, _, _, user, name, action, branch = self.path.partition("?")[0].split("/")
            repository = f"{user}/{name}"
            if action == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(content)["files"]]
                return self.json({"files": [{**f, "shouldIgnore": False} for f in files]})
            lines = [json.loads(line) for line in content.splitlines()]
            branch = "refs/pr/1" if "create_pr=1" in self.path else branch
            files = hub.files[repository].setdefault(branch, {})
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address, sha = f"http://{self.headers['Host']}/{repository}", hub.sha(repository, branch)
            pull = {"pullRequestUrl": f"{address}/discussions/1"} if branch.startswith("refs/pr") else {}
            self.json({"success": True, "commitUrl": f"{address}/commit/{sha}", "commitOid": sha, **pull})

        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path))
            parts = self.path.partition("?")[0].strip("/").split("/")
            if len(parts) < 4 or (parts[0] == "api" and parts[1] != "models"):
                return self.json({"error": "Not found"}, 404)
            if parts[:2] == ["api", "models"]:
                repository, revision = "/".join(parts[2:4]), "/".join(parts[5:]).replace("%2F", "/") or "main"
                files = hub.at(repository, revision)
                if files is None:
                    return self.json({"error": "Not found"}, 404, X_Error_Code="RepoNotFound")
                if parts[4:5] == ["tree"]:
                    return self.json([tree_entry(*file) for file in files.items()])
                sha = next(hub.sha(repository, b) for b, own in hub.files[repository].items() if own is files)
                return self.json({"id": repository, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
            repository, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            files = hub.at(repository, revision) or {}
            if path not in files:
                return self.json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha1(files[path]).hexdigest()
            self.answer(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=revision)

        do_HEAD = do_GET

    return Handler


@contextmanager
def local_hub(cache: Path, monkeypatch: pytest.MonkeyPatch, token: str = "hf_of_a_test") -> Iterator[Hub]:
    """Let huggingface_hub talk to a server on this machine while inside, with an empty cache and that token."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
