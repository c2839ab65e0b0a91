"""Fixtures that are dear to make and never changed by a test."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads only wait for each other, most of all on shared cores
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest

from tests.small import make_corpus, make_teacher, random_sequences


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with padded vocabulary."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 sequences, some of several documents, one that fills the context."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(40, vocab_size=300))
