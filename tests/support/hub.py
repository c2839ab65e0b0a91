"""A small model hub on loopback: folders served by name, with one commit each."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISION = "v1"
"""The tag that every model has beside `main`."""


class Hub(ThreadingHTTPServer):
    """Serves `models`, names to folders; keeps the paths that were asked for."""

    def __init__(self, models: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def commit_of(folder: Path) -> str:
    """40 hexadecimal digits that change with what is in the folder."""
    contents = b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir()))
    return hashlib.sha1(contents).hexdigest()


@contextmanager
def serving(models: dict[str, Path]) -> Iterator[Hub]:
    """A hub for the time of the block."""
    hub = Hub(models)
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        """Nothing is said."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        folder = self.server.models.get("/".join(parts[:2]))
        revision = parts[3] if len(parts) > 3 else "main"
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        commit = commit_of(folder)
        if revision not in ("main", REVISION, commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        headers = {"X-Repo-Commit": commit}
        if path.startswith("api/") and parts[2] == "tree":
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)}
                for file in sorted(folder.iterdir())
            ]
            return self._send(200, json.dumps(entries).encode(), headers, with_body)
        if path.startswith("api/"):
            return self._send(200, json.dumps({"id": "/".join(parts[:2]), "sha": commit}).encode(), headers, with_body)
        file = folder / parts[4]
        if not file.is_file():
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, with_body)
        return self._send(200, file.read_bytes(), headers | {"ETag": f'"{_etag(file)}"'}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
