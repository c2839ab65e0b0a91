"""A real S3 protocol server on loopback, which fails on demand.

    python -m tests.s3_server READY_FILE      writes its address there; holds all objects in memory

`POST /_faults` with a JSON list of {"kind", "method", "path", "count"} arms it: the next `count`
requests of that method whose path contains `path` meet the fault. `GET /_faults` says how often each was met.

    500         an internal error, before anything happens
    throttle    503 SlowDown, before anything happens
    deny        403 AccessDenied, before anything happens
    drop        the connection is closed, before anything happens
    lose        the request is carried out, and the connection closed without an answer
    cut         the connection is closed in the middle of the answer's body
"""

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ERRORS = {
    "500": ("500 Internal Server Error", "InternalError"),
    "throttle": ("503 Slow Down", "SlowDown"),
    "deny": ("403 Forbidden", "AccessDenied"),
}


class Faulty:
    """A WSGI application in front of another."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._faults: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            return self._control(environ, start_response)
        kind = self._met(environ)
        if kind in ERRORS:
            status, code = ERRORS[kind]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        if kind == "drop":
            return self._close(environ)
        if kind in ("lose", "cut"):
            answer = list(self._application(environ, start_response if kind == "cut" else lambda *ignored: None))
            if kind == "lose":
                return self._close(environ)
            return self._cut(environ, b"".join(answer))
        return self._application(environ, start_response)

    def _met(self, environ: dict[str, Any]) -> str | None:
        with self._lock:
            for fault in self._faults:
                matches = fault["method"] == environ["REQUEST_METHOD"] and fault["path"] in environ["PATH_INFO"]
                if matches and fault["met"] < fault["count"]:
                    fault["met"] += 1
                    return fault["kind"]
        return None

    def _control(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "POST":
                faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                self._faults = [fault | {"met": 0} for fault in faults]
            body = json.dumps([fault["met"] for fault in self._faults]).encode()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [body]

    def _close(self, environ: dict[str, Any]) -> Iterable[bytes]:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return []

    def _cut(self, environ: dict[str, Any], body: bytes) -> Iterable[bytes]:
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def main(ready: Path) -> None:
    """Serve until killed."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    application = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    partial = ready.with_suffix(".partial")
    partial.write_text(f"http://127.0.0.1:{server.port}")
    os.replace(partial, ready)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
