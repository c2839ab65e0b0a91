"""A cache in the other container: equal to the bit, whatever interrupts the conversion."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import open_cache
from pipeline.cache import pieces
from pipeline.cache.commits import COMMITS, SHARDS, commit_path
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, ConfigError
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.settings import ConvertConfig
from tests.support.helpers import run, wait_until
from tests.support.small import assert_equal_caches, make_cache

ROOT = Path(__file__).parent.parent
OTHER = {"arrow": "zarr", "zarr": "arrow"}


@pytest.mark.parametrize(
    ("container", "max_kl_error", "top_k", "draws"),
    [("arrow", 1e-4, 8, 0), ("zarr", 1e-4, 8, 2), ("arrow", 1e-4, 0, 5), ("zarr", 0.0, 8, 0)],
)
def test_converted_cache_is_equal_to_the_bit(tmp_path, corpus, container, max_kl_error, top_k, draws):
    settings = {"max_kl_error": max_kl_error, "top_k": top_k, "tail_samples": draws}
    source = make_cache(tmp_path / "source", corpus, container=container, **settings)
    convert_cache(ConvertConfig(cache=source, format=OTHER[container], out=tmp_path / "other", workers=1))
    assert verify_cache(tmp_path / "other").problems == []
    assert_equal_caches(source, tmp_path / "other")
    convert_cache(ConvertConfig(cache=tmp_path / "other", format=container, out=tmp_path / "back", workers=1))
    assert CacheManifest.read(tmp_path / "back") == CacheManifest.read(source)
    assert_equal_caches(source, tmp_path / "back")


def test_command_converts_in_several_processes_and_a_second_run_does_nothing(tmp_path, corpus):
    source = make_cache(tmp_path / "source", corpus)
    command = ["convert", source, "--format", "zarr", "--out", tmp_path / "other", "--workers", 2]
    code, _, err = run(*command)
    assert code == 0, err
    assert "every shard was read back and is equal" in err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "other" / SHARDS).iterdir()}
    assert run(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_equal_caches(source, tmp_path / "other")


def test_converted_cache_is_what_the_capture_would_have_made(tmp_path, corpus):
    """Another run of cache-logits with --format zarr finds its own, and nothing to do."""
    source = make_cache(tmp_path / "source", corpus)
    convert_cache(ConvertConfig(cache=source, format="zarr", out=tmp_path / "other", workers=1))
    make_cache(tmp_path / "captured", corpus, container="zarr")
    CacheManifest.read(tmp_path / "other").require_equal(CacheManifest.read(tmp_path / "captured"), tmp_path)


KILLED = """
from pathlib import Path
from sys import argv
from pipeline.lifecycle.settings import ConvertConfig
from pipeline.lifecycle.convert import convert_cache
from tests.support.crash import kill_everywhere
config = ConvertConfig(cache=Path(argv[1]), format="arrow", out=Path(argv[2]), workers=1)
kill_everywhere(lambda: convert_cache(config))
"""


def test_kill_9_at_every_file_operation_loses_and_repeats_nothing(tmp_path, corpus):
    source = make_cache(tmp_path / "source", corpus, container="zarr")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "other")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 10
    assert verify_cache(tmp_path / "other").problems == []
    assert_equal_caches(source, tmp_path / "other")
    manifest = CacheManifest.read(source)
    assert len(list((tmp_path / "other" / SHARDS).iterdir())) == manifest.num_partitions


def test_damaged_source_is_refused_and_nothing_of_it_is_committed(tmp_path, corpus):
    source = make_cache(tmp_path / "source", corpus)
    path = sorted((source / SHARDS).iterdir())[2]
    contents = bytearray(path.read_bytes())
    contents[3000] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CacheCorruptError, match=path.name):
        convert_cache(ConvertConfig(cache=source, format="zarr", out=tmp_path / "other", workers=1))
    assert not commit_path(tmp_path / "other", 2).exists()
    assert not list((tmp_path / "other" / SHARDS).glob("*.partial"))


def test_copy_that_reads_back_otherwise_is_not_committed(tmp_path, corpus, monkeypatch):
    """A container's library that loses a value."""
    source = make_cache(tmp_path / "source", corpus)
    split = pieces.split

    def lossy(*arguments):
        for sequence in split(*arguments):
            yield sequence | {"ids": sequence["ids"] + (len(calls) < 3)}
            calls.append(1)

    calls: list[int] = []
    monkeypatch.setattr(pieces, "split", lossy)
    with pytest.raises(CacheCorruptError, match="column 'ids' of sequence 0 was read back with other values"):
        convert_cache(ConvertConfig(cache=source, format="zarr", out=tmp_path / "other", workers=1))
    assert list((tmp_path / "other" / COMMITS).iterdir()) == []
    assert list((tmp_path / "other" / SHARDS).iterdir()) == []


def test_mistakes_are_named(tmp_path, corpus):
    source = make_cache(tmp_path / "source", corpus)
    with pytest.raises(ConfigError, match="is a cache of arrow shards already"):
        convert_cache(ConvertConfig(cache=source, format="arrow", out=tmp_path / "other"))
    with pytest.raises(CacheMismatchError, match="container is 'arrow', now 'zarr'"):
        convert_cache(ConvertConfig(cache=source, format="zarr", out=source))
    shutil.copytree(source, tmp_path / "part")
    commit_path(tmp_path / "part", 1).unlink()
    with pytest.raises(CacheIncompleteError, match="1 of 6 partitions"):
        convert_cache(ConvertConfig(cache=tmp_path / "part", format="zarr", out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    """kill -9 of the command leaves no process behind."""
    script = (
        "import time\nfrom pipeline.parallel import in_processes\n"
        "if __name__ == '__main__':\n    list(in_processes(time.sleep, [600, 600], 2))\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=environment)
    command = psutil.Process(process.pid)
    wait_until(lambda: len(command.children()) == 3)  # two workers, and Python's resource tracker
    started = command.children()
    process.kill()
    process.wait()
    assert psutil.wait_procs(started, timeout=60)[1] == []


def test_blocks_give_every_sequence_once(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK_TARGETS", 40)
    cache = open_cache(make_cache(tmp_path / "source", corpus))
    commit, layout = cache.commits[0], cache.shard(0).layout
    shard = cache.shard(0).open()
    keys = [row["key"].tobytes() for row in pieces.sequences_of_shard(shard, layout)]
    assert keys == [cache[index].key for index in range(commit.num_sequences)]
    rows = np.array([0, 2, commit.num_sequences - 1])
    some = pieces.Piece(cache.shard(0), rows).sequences(shard)
    assert [row["key"].tobytes() for row in some] == [keys[row] for row in rows]
