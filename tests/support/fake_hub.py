"""A Hugging Face Hub on this machine: model repositories in memory, over the HTTP that huggingface_hub speaks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


@dataclass
class FakeHub:
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    url: str = ""

    def env(self) -> dict[str, str]:
        """What a child process needs to use this Hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(status, json.dumps(value).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path == "api/whoami-v2":
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                self._json(
                    {"name": "owner", "type": "user"} if known else {"error": "unauthorized"}, 200 if known else 401
                )
                return
            if path.startswith("api/models/"):
                name = "/".join(path.split("/")[2:4])
                files = hub.repositories.get(name)
                if files is None:
                    self._send(404, b"", X_Error_Code="RepoNotFound")
                elif "/tree/" in path:
                    self._json([{"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in files.items()])
                else:
                    self._json(
                        {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                    )
                return
            name, _, rest = path.partition("/resolve/")
            content = hub.repositories.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self._send(404, b"", X_Error_Code="EntryNotFound" if name in hub.repositories else "RepoNotFound")
                return
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = self.path.partition("?")[0].strip("/").split("/")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._json({"error": "unauthorized"}, 401)
            elif parts[-1] == "create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                self._json({"url": f"{hub.url}/{name}"})
            elif parts[-1] == "validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif "preupload" in parts:
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                         for f in json.loads(body)["files"]]  # fmt: skip
                self._json({"files": files})
            else:
                name = "/".join(parts[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
