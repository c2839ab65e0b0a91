"""Object stores on loopback, and the environment that leads to them."""

import base64
import contextlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from pipeline import copies, storage
from pipeline.corpus import Corpus
from pipeline.runs.commits import read_commit
from pipeline.runs.folder import open_folder
from pipeline.storage import ObjectPath
from stages.cache_logits.capture import capture
from tests.small import FakeEngine, fake_manifest

ROOT = Path(__file__).parent.parent
AZURITE = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
"""Where `make slow` puts it."""
ACCOUNT, KEY = "test", base64.b64encode(b"of this test alone").decode()
BUCKET = "bucket"


class Server:
    """A running store: its address, the environment of its users, and how its URLs begin."""

    def __init__(self, address: str, scheme: str, environment: dict[str, str]) -> None:
        self.address, self.scheme, self.environment = address, scheme, environment

    def fail(self, *faults: tuple[str, str, str, int]) -> None:
        """Arm tests.s3_server with (kind, method, part of the path, count)."""
        names = ("kind", "method", "path", "count")
        self.ask("/_faults", "POST", json.dumps([dict(zip(names, fault)) for fault in faults]).encode())

    def met(self) -> list[int]:
        """How often each fault was met."""
        return json.loads(self.ask("/_faults", "GET"))

    def enter(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ObjectPath:
        """A URL that no other test uses; copies go to `folder`, which is empty."""
        for name, value in {**self.environment, copies.COPIES: str(folder / "copies")}.items():
            monkeypatch.setenv(name, value)
        storage._store.cache_clear()  # another module's server may have had this bucket
        return ObjectPath(f"{self.scheme}://{BUCKET}/{folder.name}/cache")

    def ask(self, path: str, method: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """The body of the answer to a request."""
        request = urllib.request.Request(self.address + path, data=body, method=method, headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[Server]:
    """tests.s3_server with an empty bucket."""
    ready = folder / "address"
    with _process([sys.executable, "-m", "tests.s3_server", str(ready)]) as process:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": ready.read_text(),
            "AWS_ALLOW_HTTP": "true",
        }
        server = Server(ready.read_text(), "s3", environment)
        server.ask(f"/{BUCKET}", "PUT")
        yield server


def find_azurite() -> str | None:
    """Azure's own emulator of its Blob Storage, if it is installed."""
    return str(AZURITE) if AZURITE.is_file() else shutil.which("azurite-blob")


@contextlib.contextmanager
def azure_server(_: Path) -> Iterator[Server]:
    """Azurite with an empty container, in memory."""
    options = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck"]
    command = [find_azurite(), *options, "--silent", "--disableTelemetry"]
    with _process(command, AZURITE_ACCOUNTS=f"{ACCOUNT}:{KEY}") as process:
        lines = []
        while "successfully listens on" not in (line := process.stdout.readline()):
            assert line, "".join(lines)
            lines.append(line)
        address = line.split()[-1]
        environment = {
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": address,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }
        server = Server(address, "az", environment)
        server.ask(f"/{ACCOUNT}/{BUCKET}?restype=container", "PUT", headers=_signed_headers())
        yield server


def _signed_headers() -> dict[str, str]:
    """Of a request that makes the container: Azure's "shared key" signature of an empty PUT."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = [f"{name}:{value}" for name, value in headers.items()]
    text = "\n".join(["PUT", *[""] * 11, *lines, f"/{ACCOUNT}/{ACCOUNT}/{BUCKET}", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
    return headers | {"Authorization": f"SharedKey {ACCOUNT}:{signature}"}


@contextlib.contextmanager
def _process(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A server that ends with the block."""
    environment = os.environ | environment
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def put_cache(folder: Path, url: ObjectPath) -> ObjectPath:
    """A copy of a cache, file by file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (url / str(path.relative_to(folder))).write_bytes(path.read_bytes())
    return url


def capture_into(url: ObjectPath, corpus_folder: Path, **settings: object) -> None:
    """What is missing of a cache by FakeEngine."""
    corpus = Corpus(corpus_folder)
    manifest = fake_manifest(corpus, **settings)
    open_folder(url, manifest, corpus_folder / "tokenizer")
    todo = [part for part in range(manifest.num_partitions) if read_commit(url, part) is None]
    capture(FakeEngine(manifest), corpus, manifest, url, todo)
