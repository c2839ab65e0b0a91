"""Fixtures that are dear to make and never changed by a test."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads only wait for each other, most of all on shared cores
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest

from pipeline.storage import ObjectPath
from tests.object_store import Server, running
from tests.small import make_corpus, make_teacher, random_sequences


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with padded vocabulary."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 sequences, some of several documents, one that fills the context."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(40, vocab_size=300))


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An object store with one bucket."""
    with running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def server(running_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server without faults, the environment that leads to it, and a folder of its own for copies."""
    for name, value in running_server.environment(tmp_path / "copies").items():
        monkeypatch.setenv(name, value)
    running_server.fail()
    return running_server


@pytest.fixture
def url(server: Server, tmp_path: Path) -> ObjectPath:
    """A prefix that no other test uses."""
    return ObjectPath(f"s3://bucket/{tmp_path.name}/cache")
