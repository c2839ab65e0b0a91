"""A client of tests.support.s3_server, and workers on a cache in it."""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline.cache.commits import read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.corpus import Corpus
from pipeline.runs.rank import Rank
from pipeline.stores.local_copies import COPIES
from pipeline.stores.object_store import ObjectStore
from stages.cache_logits.capture import capture
from stages.cache_logits.engine import Engine
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.leftovers import kept
from tests.support.small import fake_manifest
from tests.support.workers import ALONE, exit_code_of, run_worker

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.workers"])


class Server:
    """A running tests.support.s3_server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def fail(self, *faults: tuple[str, str, str, int]) -> None:
        """Arm it with (kind, method, part of the path, count)."""
        names = ("kind", "method", "path", "count")
        self.ask("/_faults", "POST", json.dumps([dict(zip(names, fault)) for fault in faults]).encode())

    def met(self) -> list[int]:
        """How often each fault was met."""
        return json.loads(self.ask("/_faults", "GET"))

    def ask(self, path: str, method: str, body: bytes | None = None) -> bytes:
        """The answer to a request."""
        request = urllib.request.Request(self.address + path, data=body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def environment(self, copies: Path) -> dict[str, str]:
        """What leads a client to it, and to a folder for copies."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ALLOW_HTTP": "true",
            COPIES: str(copies),
        }


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A server with one bucket, until the end of the context; its address comes through a file in `folder`."""
    ready = folder / "address"
    command = [sys.executable, "-m", "tests.support.s3_server", str(ready)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent.parent)
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.05)
        server = Server(ready.read_text())
        server.ask("/bucket", "PUT")
        with kept(process.pid):
            yield server
    finally:
        process.kill()
        process.wait()


def put_cache(folder: Path, url: ObjectStore) -> ObjectStore:
    """A copy of a cache, file by file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (url / str(path.relative_to(folder))).write(path.read_bytes())
    return url


def capture_into(url: ObjectStore, corpus_folder: Path, **settings: object) -> None:
    """What is missing of a cache by FakeEngine."""
    corpus = Corpus(corpus_folder)
    manifest = fake_manifest(corpus, **settings)
    CacheFolder.begin(url, manifest, corpus_folder / "tokenizer")
    todo = [part for part in range(manifest.num_partitions) if read_commit(url, part) is None]
    capture(FakeEngine(manifest), corpus, CacheFolder(url), todo)


def start_store_worker(
    url: ObjectStore,
    corpus: Path,
    rank: Rank = ALONE,
    make_engine: Callable[[CacheManifest], Engine] = FakeEngine,
    *,
    lease_s: float,
    host: str = "",
) -> BaseProcess:
    """A worker in a process that believes to be on `host`; no fork of this one, in which the client has no threads."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", COPIES))}
    arguments = (str(url), corpus, rank, make_engine, lease_s, host, environment)
    process = _processes.Process(target=_work, args=arguments, daemon=True)
    process.start()
    return process


def _work(
    url: str,
    corpus: Path,
    rank: Rank,
    make_engine: Callable[[CacheManifest], Engine],
    lease_s: float,
    host: str,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    if host:
        socket.gethostname = lambda: host
    sys.exit(exit_code_of(lambda: run_worker(ObjectStore(url), corpus, rank, make_engine, lease_s=lease_s)))


def end_of_store_worker(process: BaseProcess) -> int:
    """Wait for it; its exit code, or the signal that killed it, negative."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode
