"""Fixtures that are dear to make and never changed by a test."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from pipeline.cpu import prepare_threads
from tests.support import leftovers

# Tiny tensors: threads only wait for each other, most of all on shared cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_threads()
os.environ[leftovers.MARK] = str(os.getpid())
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# A shell has what it runs in the background ignore these, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import CacheConfig
from tests.support.object_store import Server, running
from tests.support.sketched import sketch_settings
from tests.support.small import make_corpus, make_teacher, random_sequences


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Whatever way a test ends, what it has started ends too; of a test that has passed it is an error.

    Else a worker that heeds no SIGTERM would keep pytest itself from ending, which waits for its children.
    """
    before = {process.pid for process in leftovers.children()}
    yield
    left = leftovers.end([process for process in leftovers.children() if process.pid not in before])
    assert not left, f"the test has left processes behind, which were killed: {'; '.join(left)}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """At the very end nothing is left either, not even what has lost its parent."""
    left = leftovers.end(leftovers.marked())
    if left:
        print("\nprocesses that the tests have left behind were killed:", *left, sep="\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with padded vocabulary."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 sequences, some of several documents, one that fills the context."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(40, vocab_size=300))


@pytest.fixture(scope="session")
def sketched(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> dict[str, CacheConfig]:
    """The settings of two captures with a tail sketch, by container, whose caches are there."""
    folder = tmp_path_factory.mktemp("sketched")
    configs = {name: sketch_settings(teacher, corpus, folder / name, format=name) for name in ("arrow", "zarr")}
    for config in configs.values():
        cache_logits(config)
    return configs


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An object store with one bucket."""
    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def tmp_path(tmp_path: Path) -> LocalStore:
    """A folder of the test's own, as a store."""
    return LocalStore(tmp_path)


@pytest.fixture
def server(running_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server without faults, the environment that leads to it, and a folder of its own for copies."""
    for name, value in running_server.environment(tmp_path / "copies").items():
        monkeypatch.setenv(name, value)
    running_server.fail()
    return running_server


@pytest.fixture
def url(server: Server, tmp_path: Path) -> ObjectStore:
    """A prefix that no other test uses."""
    return ObjectStore(f"s3://bucket/{tmp_path.name}/cache")
