"""A real S3 protocol server on loopback, which fails on demand.

    python -m tests.support.s3_server READY_FILE      writes its address there; holds all objects in memory

`POST /_faults` with a JSON list of {"kind", "method", "path", "count"} arms it: the next `count` requests of that
method ("" is any) whose path and query contain `path` meet the fault. `GET /_faults` says how often each was met.

    500         an internal error, before anything happens
    throttle    503 SlowDown with Retry-After, before anything happens
    ...         and so on for the rest of ERRORS
    html        a page of a proxy, with status 200, before anything happens; html404, html503: with another
    drop        the connection is closed, before anything happens
    outage S    the same, for S seconds from the first request that meets it
    lose        the request is carried out, and the connection closed without an answer
    cut         the connection is closed in the middle of the answer's body
    reset N     the same, but after N bytes of the body, and by a reset
    stall S     the answer stands still for S seconds in the middle of its body
    slow B      bodies of requests and answers pass at B bytes a second, all of them together
"""

import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ERRORS = {
    "500": ("500 Internal Server Error", "InternalError"),
    "throttle": ("503 Slow Down", "SlowDown"),
    "deny": ("403 Forbidden", "AccessDenied"),
    "unknown": ("403 Forbidden", "InvalidAccessKeyId"),
    "expired": ("400 Bad Request", "ExpiredToken"),
    "expired403": ("403 Forbidden", "ExpiredToken"),
    "skewed": ("403 Forbidden", "RequestTimeTooSkewed"),
    "timeout": ("400 Bad Request", "RequestTimeout"),
    "conflict": ("409 Conflict", "ConditionalRequestConflict"),
    "upload": ("404 Not Found", "NoSuchUpload"),
    "bucket": ("404 Not Found", "NoSuchBucket"),
}
PAGE = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"
PIECE = 16 << 10
"""Bytes that pass a slow link at a time."""


class Faulty:
    """A WSGI application in front of another."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._faults: list[dict[str, Any]] = []
        self._lock, self._link, self._conditions = threading.Lock(), threading.Lock(), threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            return self._control(environ, start_response)
        kind, _, number = (self._met(environ) or "").partition(" ")
        if kind in ERRORS:
            status, code = ERRORS[kind]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Type", "application/xml"), ("Retry-After", "1")])
            return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        if kind.startswith("html"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                kind.removeprefix("html") or "200", [("Content-Type", "text/html"), ("Content-Length", str(len(PAGE)))]
            )
            return [PAGE]
        if kind in ("drop", "outage"):
            return self._close(environ)
        if kind == "slow":
            environ["wsgi.input"] = _SlowBody(environ["wsgi.input"], self._link, float(number))
            return _slowly(b"".join(self._application(environ, start_response)), self._link, float(number))
        if kind in ("reset", "stall"):
            body = b"".join(self._application(environ, start_response))
            return self._reset(environ, body, int(number)) if kind == "reset" else _standing_still(body, float(number))
        if kind in ("lose", "cut"):
            answer = list(self._application(environ, start_response if kind == "cut" else lambda *ignored: None))
            if kind == "lose":
                return self._close(environ)
            return self._cut(environ, b"".join(answer))
        if {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys():
            with self._conditions:  # moto looks and then writes; a store does both in one step
                return list(self._application(environ, start_response))
        return self._application(environ, start_response)

    def _met(self, environ: dict[str, Any]) -> str | None:
        with self._lock:
            for fault in self._faults:
                where = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
                matches = fault["method"] in ("", environ["REQUEST_METHOD"]) and fault["path"] in where
                if matches and fault["met"] < fault["count"] and not _is_over(fault):
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

    def _reset(self, environ: dict[str, Any], body: bytes, num_bytes: int) -> Iterable[bytes]:
        yield body[:num_bytes]
        if num_bytes < len(body):
            environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            environ["werkzeug.socket"].close()


def _is_over(fault: dict[str, Any]) -> bool:
    kind, _, seconds = fault["kind"].partition(" ")
    return kind == "outage" and time.monotonic() > fault.setdefault("began", time.monotonic()) + float(seconds)


def _standing_still(body: bytes, seconds: float) -> Iterable[bytes]:
    yield body[: len(body) // 2]
    time.sleep(seconds)
    yield body[len(body) // 2 :]


def _slowly(body: bytes, link: threading.Lock, bytes_per_s: float) -> Iterable[bytes]:
    for start in range(0, len(body), PIECE):
        with link:
            time.sleep(min(PIECE, len(body) - start) / bytes_per_s)
        yield body[start : start + PIECE]


class _SlowBody:
    """The body of a request that comes over a slow link."""

    def __init__(self, body: Any, link: threading.Lock, bytes_per_s: float) -> None:
        self._pieces = lambda contents: b"".join(_slowly(contents, link, bytes_per_s))
        self._body = body

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes."""
        pieces, left = [], size if size >= 0 else sys.maxsize
        while left and (piece := self._body.read(min(left, PIECE))):
            pieces.append(self._pieces(piece))
            left -= len(piece)
        return b"".join(pieces)


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
