"""Stand-ins on loopback: the parts of the Hugging Face hub and of Weights & Biases that their clients talk to here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(format % args)

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[Handler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Hub(Server):
    """Repositories: name -> {path: content}; one commit each. `.safetensors` go through LFS, as on the hub."""

    def __init__(self) -> None:
        super().__init__(HubHandler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.writer = "hf_may_write"


class HubHandler(Handler):
    server: Hub

    def may_write(self) -> bool:
        allowed = self.headers.get("authorization") == f"Bearer {self.server.writer}"
        if not allowed:
            self.answer({"error": "Invalid user token."}, 401)
        return allowed

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self.info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[2:3] == ["resolve"]:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def info(self, repo: str, revision: str) -> None:
        if repo not in self.server.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        else:
            files = [{"rfilename": name} for name in self.server.repos[repo]]
            self.answer({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "tags": []})

    def file(self, repo: str, name: str) -> None:
        content = self.server.repos.get(repo, {}).get(name)
        if content is None:
            self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    def do_POST(self) -> None:
        body, path = self.body(), urlsplit(self.path).path
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not self.may_write():
            return
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = f"{self.server.address}/lfs/"
            self.answer(
                {"objects": [{**o, "actions": {"upload": {"href": href + o["oid"]}}} for o in objects]},
                Content_Type="application/vnd.git-lfs+json",
            )
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({}, 404)

    def create(self, asked: dict[str, Any]) -> None:
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        exists = name in self.server.repos
        self.server.repos.setdefault(name, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        self.answer({"url": f"{self.server.address}/{name}", "id": name}, 409 if exists else 200)

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.lfs[oid] = content
        self.answer({})

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.lfs[value["oid"]]
        self.answer({"commitUrl": f"{self.server.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})


class WandB(Server):
    """Runs: (entity, project, id) -> {path: content}, of a user whose default entity is `jane`."""

    def __init__(self) -> None:
        super().__init__(WandBHandler)
        self.runs: dict[tuple[str, str, str], dict[str, bytes]] = {}
        self.downloads: list[str] = []


class WandBHandler(Handler):
    server: WandB

    def do_POST(self) -> None:
        body = self.body()
        if self.path != "/graphql":
            self.answer({}, 404)
            return
        asked = json.loads(body)
        query, variables = asked["query"], asked.get("variables") or {}
        if "project(" not in query:
            viewer = {"id": "1", "entity": "jane", "username": "jane", "name": "jane", "email": "", "flags": "{}"}
            self.answer({"data": {"viewer": {**viewer, "admin": False, "teams": {"edges": []}}}})
            return
        key = (variables["entity"], variables["project"], variables["name"])
        if key not in self.server.runs:
            self.answer({"data": {"project": {"run": None}}})
            return
        files = self.server.runs[key]
        run: dict[str, Any] = {
            "id": "1", "name": key[2], "displayName": "a name", "projectId": 1, "sweepName": None, "tags": [],
            "state": "finished", "config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}", "group": None,
            "jobType": None, "commit": None, "readOnly": False, "createdAt": "2026-01-31T12:00:00Z", "notes": None,
            "heartbeatAt": "2026-01-31T12:00:00Z", "description": None, "historyLineCount": 0, "historyKeys": None,
            "user": {"name": "jane", "username": "jane"}, "fileCount": len(files),
        }  # fmt: skip
        wanted = [name for name in files if name in variables.get("fileNames", [])]
        run["files"] = {
            "edges": [{"node": self.node(key, name, files[name]), "cursor": name} for name in wanted],
            "pageInfo": {"endCursor": None, "hasNextPage": False},
        }
        self.answer({"data": {"project": {"internalId": 1, "run": run}}}, Content_Type="application/json")

    def node(self, key: tuple[str, str, str], name: str, content: bytes) -> dict[str, Any]:
        url = f"{self.server.address}/files/{'/'.join(key)}/{name}"
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {"id": name, "name": name, "url": url, "directUrl": url, "sizeBytes": str(len(content)), "md5": md5,
                "mimetype": "", "updatedAt": "2026-01-31T12:00:00Z"}  # fmt: skip

    def do_GET(self) -> None:
        parts = [unquote(part) for part in self.path.strip("/").split("/")]
        entity, project, run_id, *name = parts[1:]
        content = self.server.runs.get((entity, project, run_id), {}).get("/".join(name))
        self.server.downloads.append("/".join(name))
        self.answer(b"" if content is None else content, 404 if content is None else 200)
