"""A reader of caches written from docs/format.md alone, and whether ours agrees with it."""

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zarr

from pipeline import open_cache
from pipeline.errors import CacheMismatchError
from pipeline.files import read_json, write_json
from pipeline.runs.commits import SHARDS
from tests.small import make_cache

# The reader begins here and uses nothing of ours.


def read_document(path):
    text = path.read_bytes()
    head = text[: text.rindex(b',\n "checksum"')]
    document = json.loads(text)
    assert xxhash.xxh3_128_hexdigest(head + b"\n}") == document["checksum"]
    return document


def read_by_the_book(folder):
    """Every sequence of a cache: its columns by name, flat arrays as in the table."""
    manifest = read_document(folder / "manifest.json")
    assert (manifest["format"], manifest["format_version"]) == ("sparse-target-cache", 2)
    for partition in range(len(manifest["partitions"]) - 1):
        path = folder / "shards" / read_document(folder / "commits" / f"{partition:05d}.json")["file"]
        yield from {"arrow": read_arrow, "zarr": read_zarr}[manifest["container"]](path, manifest)


def read_arrow(path, manifest):
    for row in pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist():
        yield {name: np.frombuffer(value, "u1") if name == "key" else np.array(value) for name, value in row.items()}


def read_zarr(path, manifest):
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    arrays = {name: array[:] for name, array in group.arrays()}
    counts = {name: np.cumsum([0, *arrays[name]]) for name in ("num_tokens", "num_documents", "num_targets")}
    kinds = {"document_lengths": "num_documents", "token_ids": "num_tokens", "loss_mask": "num_tokens"}
    model = {name: arrays.pop(name) for name in [*arrays] if name.startswith("table_") or name == "vocabulary"}
    for i in range(len(arrays["key"])):
        row = {}
        for name, values in arrays.items():
            if name in ("key", "checksum", *counts):
                row[name] = values[i]
            else:
                ends = counts[kinds.get(name, "num_targets")]
                row[name] = values[ends[i] : ends[i + 1]]
        yield unpack(row, model, group.attrs["previous_tables"], manifest)


def unpack(row, model, previous_tables, manifest):
    if manifest["top_k"] == 0:
        return row
    sizes = model["table_sizes"].astype(int)
    pieces = np.split(model["table_entries"], np.cumsum(sizes)[:-1]) if len(sizes) else []
    tables = [dict(zip(model["table_tokens"][part], pieces[part])) for part in
              (slice(0, previous_tables), slice(previous_tables, None))]  # fmt: skip
    at = np.flatnonzero(row["loss_mask"][1:])
    on_grid = manifest["max_kl_error"] > 0
    codes, modes = row.pop("codes").astype(int), row.pop("modes")
    steps = row.pop("steps", np.zeros((len(codes), 0), int)).astype(int) if on_grid else np.ones(codes[:, 1:].shape)
    ids = np.zeros(codes.shape, np.int64)
    for n, (code, mode) in enumerate(zip(codes, modes)):
        for k in range(2, len(code)):
            code[k] += code[k - 1] if steps[n, k - 1] == 0 else 0
        for k in range(len(code)):
            kind, context = (mode & 1, ids[n, 0]) if k and mode & 1 else (0, row["token_ids"][at[n]])
            place = tables[kind][context][code[k]] if code[k] < 1024 else code[k] - 1024
            ids[n, k] = model["vocabulary"][place]
        runs = np.cumsum([0, *(steps[n] != 0)])
        ids[n] = ids[n][np.lexsort((ids[n], runs))]
    row["ids"] = ids
    if on_grid:
        row["levels"] = modes >> 1
        b = 0.6 / min(manifest["temperatures"])
        c = 1 - 1 / (128 * b)
        h = np.cumsum(np.pad(steps, ((0, 0), (1, 0))), axis=1) * 2.0 ** (-6 - row["levels"][:, None] / 2)
        curved = np.log(1 - np.minimum(h, c)) / b
        row["logits"] = np.where(h < c, curved, np.log(1 / (128 * b)) / b - 128 * (h - c)).astype("f4")
        with np.errstate(divide="ignore"):
            row["tail_logprobs"] = np.log(np.sin(row.pop("tails") * np.pi / 4096) ** 2).astype("f4")
        row["entropies"] = (row.pop("nats") / 64).astype("f4")
        found = ids == row["token_ids"][at + 1][:, None]
        stored = (row["logits"] * found).sum(axis=1)
        absent = row.pop("label_steps") / -1024
        row["label_logits"] = np.where(found.any(axis=1), stored, absent).astype("f4")
    return row


def probabilities(row, temperature, manifest):
    index = manifest["temperatures"].index(temperature)
    if "logsumexps" in row:
        return np.exp(row["logits"] / temperature - row["logsumexps"][:, index, None])
    weights = np.exp(row["logits"] / temperature)
    return weights / weights.sum(axis=1, keepdims=True) * (1 - np.exp(row["tail_logprobs"][:, index, None]))


TYPES = {"key": "u1", "loss_mask": "?", "levels": "u1", "ids": "i4", "draws": "i4", "token_ids": "i4"}


def checksum(row):
    names = sorted(set(row) - {"checksum"})
    counts = {"num_tokens": "token_ids", "num_documents": "document_lengths", "num_targets": "entropies"}
    row = row | {name: len(row[of]) for name, of in counts.items()}
    types = TYPES | dict.fromkeys([*counts, "document_lengths"], "i4")
    return xxhash.xxh3_64_intdigest(
        b"".join(np.ascontiguousarray(row[name], types.get(name, "f4")).tobytes() for name in sorted({*names, *counts}))
    )


# It ends here.


@pytest.mark.parametrize("container", ["arrow", "zarr"])
@pytest.mark.parametrize(("max_kl_error", "top_k"), [(1e-4, 8), (0.0, 8), (1e-4, 1), (1e-4, 0)])
def test_reader_written_from_the_specification_agrees(tmp_path, corpus, container, max_kl_error, top_k):
    settings = {"max_kl_error": max_kl_error, "top_k": top_k, "tail_samples": 2}
    folder = make_cache(tmp_path / "cache", corpus, container=container, **settings)
    manifest = read_document(folder / "manifest.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's, on numcodecs' codecs
        rows = list(read_by_the_book(folder))
    cache = open_cache(folder)
    for row, ours in zip(rows, cache, strict=True):
        assert row["key"].tobytes() == ours.key
        assert checksum(row) == int(row["checksum"])
        for name in ("token_ids", "loss_mask", "document_lengths"):
            np.testing.assert_array_equal(row[name], getattr(ours, name))
        for name in ("ids", "logits", "tail_logprobs", "entropies", "label_logits", "draws"):
            if name in row:
                np.testing.assert_array_equal(row[name], getattr(ours.targets, name), err_msg=name)
        if top_k:
            for temperature in (1.0, 2.0):
                probs = probabilities(row, temperature, manifest)
                np.testing.assert_allclose(probs, ours.targets.probs(temperature), rtol=1e-5)


@pytest.mark.parametrize("version", [1, 3])
def test_other_format_version_is_refused(tmp_path, corpus, version):
    folder = make_cache(tmp_path / "cache", corpus)
    path = folder / "manifest.json"
    document = read_json(path, ValueError) | {"format_version": version}
    path.unlink()
    write_json(path, document)
    with pytest.raises(CacheMismatchError, match=rf"manifest\.json.*{version}.*reads.*2"):
        open_cache(folder)


def arrow_shard(tmp_path, corpus):
    """Path of an Arrow shard, and how many targets its sequences have."""
    folder = make_cache(tmp_path / "cache", corpus)
    cache = open_cache(folder)
    commit = cache.commits[0]
    return folder / SHARDS / commit.file, [len(cache[index].targets) for index in range(commit.num_sequences)]


def test_pyarrow_reads_arrow_shards(tmp_path, corpus):
    path, counts = arrow_shard(tmp_path, corpus)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert [len(ids) for ids in table["ids"].to_pylist()] == counts


def test_polars_reads_arrow_shards(tmp_path, corpus):
    polars = pytest.importorskip("polars", reason="polars is not installed")
    path, counts = arrow_shard(tmp_path, corpus)
    assert polars.read_ipc(str(path))["ids"].list.len().to_list() == counts


def test_duckdb_reads_arrow_shards(tmp_path, corpus):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    path, counts = arrow_shard(tmp_path, corpus)
    shard = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert shard.num_rows == len(counts)
    found = duckdb.sql("select len(ids), ids[1][1], logits[1][1] from shard").fetchall()
    assert [row[0] for row in found] == counts
    assert all(row[2] == 0.0 for row in found)


@pytest.mark.slow
def test_datasets_reads_arrow_shards(tmp_path, corpus):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; `make slow` does it")
    path, counts = arrow_shard(tmp_path, corpus)
    dataset = datasets.load_dataset("arrow", data_files=str(path), split="train", cache_dir=str(tmp_path / "hub"))
    assert [len(ids) for ids in dataset["ids"]] == counts


def test_zarr_reads_zarr_shards(tmp_path, corpus):
    folder = make_cache(tmp_path / "cache", corpus, container="zarr")
    cache = open_cache(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = zarr.storage.ZipStore(Path(folder / SHARDS / cache.commits[0].file), mode="r")
        group = zarr.open_group(store, mode="r")
        np.testing.assert_array_equal(group["token_ids"][: len(cache[0].token_ids)], cache[0].token_ids)
        assert group["codes"].shape == (cache.commits[0].num_targets, 8)
        assert group["codes"].metadata.codecs[0].to_dict()["name"] == "sharding_indexed"
