"""What earlier versions have stored in caches is read to the bit, and runs that they began go on.

tests/data/caches_of_format_2.tar.xz was written by version 0.1.0 of November 2026 with FakeEngine: one corpus, five
finished caches of it, a run of which a partition is done, one leased and one set aside, and in
expected.json what that version read from the caches, as digests of every array.
"""

import hashlib
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.corpus import Corpus
from pipeline.formats.packing import model_of_2
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.helpers import run
from tests.support.rounding import UNIT
from tests.support.small import assert_equal_caches

NAMES = ("arrow", "arrow-lossless-draws", "zarr-draws", "zarr-lossless", "zarr-draws-alone")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all of them, one folder a cache."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "data" / "caches_of_format_2.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_array_is_read_to_the_bit(caches: Path, name: str) -> None:
    expected = json.loads((caches / "expected.json").read_text())[name]
    found = {}
    for sequence in open_cache(caches / name):
        arrays = {
            entry: getattr(sequence, entry)
            for entry in ("token_ids", "loss_mask", "document_lengths", "target_positions")
        }
        arrays |= {entry: values for entry, values in vars(sequence.targets).items() if entry != "temperatures"}
        assert not any(arrays.pop(entry).size for entry in ("coefficients", "sketch_errors"))  # since format 3
        found[sequence.key.hex()] = {entry: _digest(values) for entry, values in arrays.items()}
    if "lossless" not in name and "alone" not in name:  # there the reader computes them
        for arrays in (*found.values(), *expected.values()):
            del arrays["logsumexps"]
    assert found == expected


@pytest.mark.parametrize("name", ["arrow", "zarr-draws"])
def test_logsumexps_that_are_computed_are_those_of_what_is_stored(caches: Path, name: str) -> None:
    for sequence in open_cache(caches / name):
        targets = sequence.targets
        scaled = targets.logits.astype(np.float64)[:, :, None] / np.array(targets.temperatures)
        exact = np.log(np.exp(scaled).sum(1)) - np.log1p(-np.exp(targets.tail_logprobs.astype(np.float64)))
        np.testing.assert_allclose(targets.logsumexps, exact, rtol=8 * UNIT, atol=8 * UNIT)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_sound(caches: Path, name: str) -> None:
    code, output, _ = run("verify", caches / name)
    assert code == 0, output


@pytest.mark.parametrize("name", ["arrow", "zarr-draws"])
def test_they_are_converted_to_what_this_version_writes(caches: Path, tmp_path: Path, name: str) -> None:
    other = "zarr" if name == "arrow" else "arrow"
    code, _, errors = run("convert", caches / name, "--format", other, "--out", tmp_path / "cache")
    assert code == 0, errors
    assert_equal_caches(caches / name, tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "previous_tables"),
    [({"table_sizes": [2, 3]}, 1), ({"vocabulary": [5, 2**31 - 1]}, 1), ({"table_entries": [0, 1, 2**31]}, 1), ({}, 3)],
)
def test_tables_of_version_2_that_contradict_each_other_are_refused(changes: dict, previous_tables: int) -> None:
    sound = {"vocabulary": [5, 2], "table_tokens": [4, 5], "table_sizes": [2, 1], "table_entries": [0, 1, 1]}
    assert model_of_2({name: np.array(values, np.uint32) for name, values in sound.items()}, 1).vocabulary.tolist() == [
        5,
        2,
    ]
    with pytest.raises(ValueError, match="do not fit each other"):
        model_of_2({name: np.array(values, np.uint32) for name, values in (sound | changes).items()}, previous_tables)


def test_a_run_goes_on(caches: Path) -> None:
    """Its leases, failures and workers are those of the run, and so is how many failures set a partition aside."""
    folder = caches / "unfinished"
    code, output, _ = run("status", folder, "--json", "--events", 9)
    status = json.loads(output)
    assert code == 3
    assert (status["num_done"], list(status["orphaned"]), status["failed"]) == (1, ["1"], {"2": "ValueError: a test"})
    assert [event["what"] for event in status["events"]] == ["started", "claimed"]
    assert [worker["record"]["owner"] for worker in status["workers"]] == ["elsewhere.4026531836.4711"]
    manifest, corpus = CacheManifest.read(folder), Corpus(caches / "corpus")
    capture(FakeEngine(manifest), corpus, CacheFolder(folder), [1, 2])
    assert_equal_caches(caches / "arrow", folder)


def test_a_run_in_zarr_goes_on_with_shards_of_this_version(caches: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(caches / "zarr-draws", folder)
    last = max(read_commit(folder, number).partition for number in range(len(open_cache(folder).commits)))
    commit_path(folder, last).unlink()
    capture(FakeEngine(CacheManifest.read(folder)), Corpus(caches / "corpus"), CacheFolder(folder), [last])
    arrays = []
    for commit in open_cache(folder).commits:
        with zipfile.ZipFile(folder / SHARDS / commit.file) as archive:
            arrays.append({name.partition("/")[0] for name in archive.namelist()})
    assert "table_tokens" in arrays[0]
    assert "topics" in arrays[last]
    assert_equal_caches(caches / "zarr-draws", folder)


def _digest(values: np.ndarray) -> str:
    described = f"{values.dtype.str}{values.shape}".encode()
    return hashlib.sha256(described + np.ascontiguousarray(values).tobytes()).hexdigest()[:32]
