"""Caches that promise more than their files have: refused before memory is asked for, in 400 MB of address space."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zstandard
from pcodec import ChunkConfig, standalone

from pipeline.cache.commits import SHARDS, commit_path, read_commit
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.errors import CacheCorruptError, CacheError
from pipeline.files import hash_file
from pipeline.formats.archive import bundles
from pipeline.formats.arrow import arrow_schema
from pipeline.formats.containers import CONTAINERS, structure_of
from pipeline.formats.zarr import bundle_shape, chunk_shape
from pipeline.stores.sealed import read_json, write_json
from tests.support.small import make_cache, make_corpus, random_sequences

HUGE = 1 << 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(12, vocab_size=300))
    folder = tmp_path_factory.mktemp("made")
    for container in ("arrow", "zarr"):
        make_cache(folder / container, corpus, container=container)
    return folder


class Forger:
    """Makes caches whose first shard is forged, with a record that fits it as well as it can."""

    def __init__(self, made: Path, folder: Path) -> None:
        self.made, self.folder = made, folder
        self.caches: list[Path] = []

    def copy(self, container: str, name: str) -> tuple[Path, Path, CacheManifest]:
        """A new cache, its first shard and its manifest."""
        cache = self.folder / f"{container}-{name}"
        shutil.copytree(self.made / container, cache)
        self.caches.append(cache)
        return cache, cache / SHARDS / read_commit(cache, 0).file, CacheManifest.read(cache)

    def commit(self, cache: Path, **changes: object) -> None:
        """Make the record fit the shard that is there."""
        commit = read_commit(cache, 0)
        shard = cache / SHARDS / commit.file
        found = {"bytes": shard.stat().st_size, "xxh3_128": hash_file(shard)} | changes
        commit = dataclasses.replace(commit, **found)
        try:
            manifest = CacheManifest.read(cache)
            with closing(CONTAINERS[manifest.container].open(shard, manifest.layout(commit.counts))) as opened:
                commit = dataclasses.replace(commit, structure=structure_of(shard, opened))
        except CacheError:
            pass
        commit_path(cache, 0).unlink()
        write_json(commit_path(cache, 0), dataclasses.asdict(commit))

    def zarr(self, name: str, entries: dict[str, bytes], **changes: object) -> None:
        """Entries of the zip file replaced."""
        cache, shard, _ = self.copy("zarr", name)
        with zipfile.ZipFile(shard) as archive:
            contents = {info.filename: archive.read(info) for info in archive.infolist()}
        shard.unlink()
        with zipfile.ZipFile(shard, "x") as archive:
            for entry, value in (contents | entries).items():
                archive.writestr(entry, value)
        self.commit(cache, **changes)

    def arrow(self, name: str, contents: bytes, **changes: object) -> None:
        """Another file in the place of the shard."""
        cache, shard, _ = self.copy("arrow", name)
        shard.write_bytes(contents)
        self.commit(cache, **changes)


def bundle(name: str, values: np.ndarray, chunk: bytes) -> bytes:
    """The first bundle of an array, every chunk of which is `chunk`."""
    shapes = chunk_shape(name, values.shape), bundle_shape(name, values.shape)
    return next(bundles(values, *shapes, lambda _: chunk))


def pcodec(values: np.ndarray) -> bytes:
    return bytes(standalone.simple_compress(values, ChunkConfig()))


def forge_zarr(forger: Forger, made: Path) -> None:
    commit = read_commit(made / "zarr", 0)
    sequences, tokens = np.zeros(commit.num_sequences, np.int32), np.zeros(commit.num_tokens, np.int32)
    with zipfile.ZipFile(made / "zarr" / SHARDS / commit.file) as archive:
        documents = {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("zarr.json")}
    bomb = pcodec(np.zeros(1 << 27, np.int32))
    assert len(bomb) < 10_000
    zeros = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    claimed = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", HUGE) + zeros[9:]
    keys, mask = np.zeros((commit.num_sequences, 16), np.uint8), np.zeros(commit.num_tokens, np.bool_)
    forger.zarr("pcodec-count", {"token_ids/c/0": bundle("token_ids", tokens, bomb)})
    forger.zarr("zstd-bomb", {"loss_mask/c/0": bundle("loss_mask", mask, zeros)})
    forger.zarr("zstd-claim", {"key/c/0/0": bundle("key", keys, claimed)})
    counts = np.full(4096, 2**31 - 1, np.int32)
    forger.zarr("counts", {"num_tokens/c/0": bundle("num_tokens", sequences, pcodec(counts))})
    forger.zarr("counts-below", {"num_targets/c/0": bundle("num_targets", sequences, pcodec(-counts))})
    one, ids = np.zeros(1, np.uint32), np.full(4096, 2**31 - 1, np.uint32)
    for name in ("vocabulary", "table_sizes", "table_entries"):
        document = json.dumps(documents[f"{name}/zarr.json"] | {"shape": [1]}).encode()
        forger.zarr(name, {f"{name}/zarr.json": document, f"{name}/c/0": bundle(name, one, pcodec(ids))})
    for what, shape, rows in (("shape", HUGE, None), ("both", HUGE, HUGE), ("rows", None, HUGE), ("none", None, 0)):
        document = json.loads(json.dumps(documents["vocabulary/zarr.json"]))
        document["shape"] = [shape] if shape else document["shape"]
        if rows is not None:
            document["chunk_grid"]["configuration"]["chunk_shape"] = [rows]
        forger.zarr(f"metadata-{what}", {"vocabulary/zarr.json": json.dumps(document).encode()})
    forger.zarr("nested", {"zarr.json": b"[" * 1_000_000})
    whole = bytearray(bundle("token_ids", tokens, pcodec(np.zeros(4096, np.int32))))
    for what, place in (("offset", (HUGE, 100)), ("length", (0, HUGE)), ("wraps", (2**63, 2**63 + 50))):
        forged = bytearray(whole)
        end = len(forged) - 4
        forged[end - 16 * 128 : end - 16 * 127] = struct.pack("<QQ", *place)
        forged[end:] = google_crc32c.value(bytes(forged[end - 16 * 128 : end])).to_bytes(4, "little")
        forger.zarr(f"index-{what}", {"token_ids/c/0": bytes(forged)})
    for name in ("num_sequences", "num_tokens", "num_documents", "num_targets"):
        forger.zarr(f"record-{name}", {}, **{name: HUGE})


def forge_sequences(forger: Forger, made: Path) -> None:
    """Twenty million sequences in a file of a few megabytes: nothing but their keys says how large it must be."""
    count = 128 * 4096 * 40
    arrays = {"key": (np.uint8, 16), "checksum": (np.uint64, 1)} | dict.fromkeys(
        ("num_tokens", "num_documents", "num_targets"), (np.int32, 1)
    )
    commit = read_commit(made / "zarr", 0)
    entries = {}
    with zipfile.ZipFile(made / "zarr" / SHARDS / commit.file) as archive:
        for name, (dtype, width) in arrays.items():
            document = json.loads(archive.read(f"{name}/zarr.json"))
            document["shape"][0] = count
            entries[f"{name}/zarr.json"] = json.dumps(document).encode()
            shape = (count, width) if width > 1 else (count,)
            rows = np.broadcast_to(np.zeros((), dtype), (bundle_shape(name, shape)[0], *shape[1:]))
            zeros = np.zeros(chunk_shape(name, shape), dtype)
            chunk = zstandard.ZstdCompressor().compress(zeros) if width > 1 else pcodec(zeros)
            whole = bundle(name, rows, chunk)
            entries |= {f"{name}/c/{number}{'/0' * (width > 1)}": whole for number in range(count // len(rows))}
    forger.zarr("sequences", entries, num_sequences=count)
    cache = forger.caches[-1]
    manifest = read_json(cache / MANIFEST, CacheCorruptError)
    (cache / MANIFEST).unlink()
    write_json(cache / MANIFEST, manifest | {"partitions": [0, count]})


def forge_grid(forger: Forger, made: Path) -> None:
    """Temperatures so high that the grid takes gigabytes, in the manifest and in the shard."""
    warm = [1e5, 2e5]
    with zipfile.ZipFile(made / "zarr" / SHARDS / read_commit(made / "zarr", 0).file) as archive:
        group = json.loads(archive.read("zarr.json"))
    group["attributes"]["temperatures"] = warm
    forger.zarr("grid", {"zarr.json": json.dumps(group).encode()})
    cache = forger.caches[-1]
    manifest = read_json(cache / MANIFEST, CacheCorruptError)
    (cache / MANIFEST).unlink()
    write_json(cache / MANIFEST, manifest | {"temperatures": warm})
    forger.commit(cache)


def forge_arrow(forger: Forger, made: Path) -> None:
    commit, manifest = read_commit(made / "arrow", 0), CacheManifest.read(made / "arrow")
    path = made / "arrow" / SHARDS / commit.file
    contents = path.read_bytes()
    table = pa.ipc.open_file(contents).read_all()
    schema = arrow_schema(manifest.layout(commit.counts))

    def file(batch: pa.RecordBatch, **options: object) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()

    def with_tokens(offsets: list[int], values: pa.Array) -> pa.RecordBatch:
        columns = dict(zip(table.schema.names, table.combine_chunks().to_batches()[0].columns))
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32).tobytes())]
        kind = schema.field("token_ids").type
        columns["token_ids"] = pa.Array.from_buffers(kind, len(offsets) - 1, buffers, children=[values])
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)

    tokens = table.column("token_ids").combine_chunks().values
    ends = table.column("token_ids").combine_chunks().offsets.to_pylist()
    forger.arrow("compressed", file(table.combine_chunks().to_batches()[0], compression="zstd"))
    zeros = pa.array(np.zeros(1 << 27, np.int32))
    forger.arrow("bomb", file(with_tokens([*ends[:-1], 1 << 27], zeros), compression="zstd"))
    changed = {
        "beyond": [*ends[:-1], 2**31 - 1],
        "below": [*ends[:-1], -5],
        "first": [-(2**31), *ends[1:]],
        "back": [0, ends[-1], *ends[2:-1], ends[-1]],
        "other": [0, *[ends[-1]] * table.num_rows],
    }
    for what, offsets in changed.items():
        ours, theirs = (np.array(values, np.int32).tobytes() for values in (ends, offsets))
        assert contents.count(ours) >= 2  # of the mask, too
        forger.arrow(f"offsets-{what}", contents.replace(ours, theirs, 1))
    missing = pa.array([None] * len(tokens), pa.int32())
    forger.arrow("missing", file(with_tokens(ends, missing)))
    footer = struct.unpack("<i", contents[-10:-6])[0]
    for what, length in (("huge", 2**31 - 1), ("below", -1), ("all", len(contents)), ("none", 0)):
        forger.arrow(f"footer-{what}", contents[:-10] + struct.pack("<i", length) + contents[-6:])
    random = np.random.default_rng(0)
    for number in range(60):  # numbers in the footer and in the header of the batch
        forged = bytearray(contents)
        start = len(contents) - 10 - footer if number % 2 else contents.index(b"\xff\xff\xff\xff", 1000)
        place = start + int(random.integers(0, footer if number % 2 else 1500)) // 8 * 8
        forged[place : place + 8] = struct.pack("<q", [HUGE, -HUGE, 2**62, 2**31 - 1, -1][number % 5])
        forger.arrow(f"number-{number}", bytes(forged))
    for name in ("num_sequences", "num_tokens", "num_documents", "num_targets"):
        forger.arrow(f"record-{name}", contents, **{name: HUGE})


def forge_documents(forger: Forger) -> None:
    changes = {
        "temperature": {"temperatures": [1e300, 2.0], "max_kl_error": 1e-4},
        "temperatures": {"temperatures": [1e5]},
        "top_k": {"top_k": 1 << 24},
        "draws": {"tail_samples": 1 << 24, "draw_temperature": 1.0},
        "many": {"temperatures": [1.0 + step for step in range(100_000)]},
        "partitions": {"partitions": [0, 2**53]},
    }
    for container in ("arrow", "zarr"):
        for name, change in changes.items():
            cache, _, _ = forger.copy(container, f"manifest-{name}")
            document = read_json(cache / MANIFEST, CacheCorruptError)
            (cache / MANIFEST).unlink()
            write_json(cache / MANIFEST, document | change)
    cache, _, _ = forger.copy("arrow", "manifest-nested")
    (cache / MANIFEST).unlink()
    write_json(cache / MANIFEST, {"a": 1})
    head = b'{\n "settings": ' + b"[" * 1_000_000 + b"]" * 1_000_000
    (cache / MANIFEST).write_bytes(sealed(head))
    cache, _, _ = forger.copy("arrow", "manifest-sparse")
    with (cache / MANIFEST).open("r+b") as file:
        file.truncate(HUGE)
    cache, _, _ = forger.copy("arrow", "record-sparse")
    with commit_path(cache, 0).open("r+b") as file:
        file.truncate(HUGE)


def sealed(head: bytes) -> bytes:
    return head + b',\n "checksum": "' + xxhash.xxh3_128_hexdigest(head + b"\n}").encode() + b'"\n}\n'


def test_what_promises_more_than_it_has_is_refused_in_little_memory(made, tmp_path):
    forger = Forger(made, tmp_path)
    forge_zarr(forger, made)
    forge_sequences(forger, made)
    forge_grid(forger, made)
    forge_arrow(forger, made)
    forge_documents(forger)
    sound = [made / "arrow", made / "zarr"]
    command = [sys.executable, "-m", "tests.support.limited", *map(str, forger.caches + sound)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    found = {Path(line["folder"]).name: line for line in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(forger.caches) + 2, (len(found), forger.caches[len(found)], done.stderr[-2000:])
    for cache in sound:
        assert (found[cache.name]["error"], found[cache.name]["problems"]) == ("", [])
    for cache in forger.caches:
        line = found[cache.name]
        if "arrow-number" not in cache.name:  # padding may have been hit
            assert line["error"] or line["problems"], cache.name
        for message in (line["error"], *line["problems"]):
            assert not message or str(cache) in message
            assert "\n" not in message
            assert "llocat" not in message, message
            assert "emory" not in message, message
        assert line["seconds"] < 5, cache.name


def test_columns_that_count_other_rows_are_refused(made):
    """Though every offset lies inside its values: the row of one sequence given to the next."""
    commit, manifest = read_commit(made / "arrow", 0), CacheManifest.read(made / "arrow")
    layout = manifest.layout(commit.counts)
    path = made / "arrow" / SHARDS / commit.file
    contents = path.read_bytes()
    table = pa.ipc.open_file(contents).read_all()
    for name in ("loss_mask", "logits", "entropies"):
        ends = table.column(name).combine_chunks().offsets.to_numpy().copy()
        ours = ends.tobytes()
        ends[1] += 1
        forged = path.with_name("forged.arrow")
        forged.write_bytes(contents[::-1].replace(ours[::-1], ends.tobytes()[::-1], 1)[::-1])
        with pytest.raises(CacheCorruptError, match="counts other rows than its neighbours"):
            CONTAINERS["arrow"].open(forged, layout)
        forged.unlink()
