"""A reader of caches written from docs/format.md alone, and whether ours agrees with it."""

import json
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zarr

from pipeline import open_cache
from pipeline.cache.commits import SHARDS
from pipeline.errors import CacheMismatchError
from pipeline.formats.containers import CONTAINERS
from pipeline.stores.sealed import read_json, write_json
from tests.support.small import make_cache

# The reader begins here and uses nothing of ours.

TYPES = {"key": "u1", "checksum": "u8", "loss_mask": "?", "levels": "u1", "coefficients": "i2"}
TYPES |= dict.fromkeys(("logits", "logsumexps", "tail_logprobs", "entropies", "label_logits"), "f4")


def read_document(path):
    text = path.read_bytes()
    document, head = json.loads(text), text[: text.rindex(b',\n "checksum"')]
    assert xxhash.xxh3_128_hexdigest(head + b"\n}") == document["checksum"]
    return document


def read_by_the_book(folder):
    """Every sequence of a cache: its columns by name, as in the table."""
    manifest = read_document(folder / "manifest.json")
    is_new = "top_p" in manifest or "sketch" in manifest or (manifest["container"] == "zarr" and manifest["top_k"])
    version = 3 if is_new else 2
    assert (manifest["format"], manifest["format_version"]) == ("sparse-target-cache", version)
    read = {"arrow": read_arrow, "zarr": read_zarr}[manifest["container"]]
    for record in sorted((folder / "commits").glob("*.json")):
        for row in read(folder / "shards" / read_document(record)["file"], manifest):
            yield {name: np.asarray(values, TYPES.get(name, "i4")) for name, values in row.items()}


def read_arrow(path, manifest):
    for row in pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist():
        counted = {"num_tokens": "token_ids", "num_documents": "document_lengths", "num_targets": "entropies"}
        counts = {name: len(row[of]) for name, of in counted.items()}
        if "top_p" in manifest:
            counts["counts"] = [len(ids) for ids in row["ids"]]
            counts["num_entries"] = sum(counts["counts"])
            row |= {name: [value for entries in row[name] for value in entries] for name in ("ids", "logits")}
        yield row | counts | {"key": np.frombuffer(row["key"], "u1")}


def read_zarr(path, manifest):
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    arrays = {name: array[:] for name, array in group.arrays()}
    vocabulary, tables = None, []
    if manifest["top_k"]:
        vocabulary = sum_in_strata(arrays.pop("vocabulary"))
        entries = np.split(arrays.pop("table_entries"), np.cumsum(arrays.pop("table_sizes"))[:-1])
        tables = [vocabulary[sum_in_strata(table)] for table in entries]
    counted = {"token_ids": "num_tokens", "loss_mask": "num_tokens", "document_lengths": "num_documents"}
    if "top_p" in manifest:
        counted |= dict.fromkeys(("codes", "logits"), "num_entries")
    for name in arrays.keys() - {"key", "checksum", "num_tokens", "num_documents", "num_targets", "num_entries"}:
        counts = arrays[counted.get(name, "num_targets")]
        if "top_p" in manifest and name == "steps":
            counts = arrays["num_entries"] - arrays["num_targets"]
        arrays[name] = np.split(arrays[name], np.cumsum(counts)[:-1])
    for i in range(len(arrays["key"])):
        row = {name: values[i] for name, values in arrays.items()}
        if "top_p" in manifest:
            yield unpack_ragged(row, vocabulary, tables, manifest)
        else:
            yield unpack(row, vocabulary, tables, manifest) if manifest["top_k"] else row


def sum_in_strata(differences):
    bounds = 8 * 2 ** np.arange(30)
    return np.concatenate([np.cumsum(part) for part in np.split(differences.astype(int), bounds)])


def unpack_ragged(row, vocabulary, tables, manifest):
    """Target by target, each a row of its own width."""
    at, counts = np.flatnonzero(row["loss_mask"][1:]), row["counts"]
    widths = {"codes": counts, "logits": counts, "steps": counts - 1}
    columns = {
        name: row.pop(name) for name in ("codes", "topics", "levels", "steps", "logits", "tails", "nats") if name in row
    }
    columns |= {"label_steps": row.pop("label_steps")} if "label_steps" in row else {}
    parts = {
        name: np.split(values, np.cumsum(widths.get(name, np.ones_like(counts)))[:-1])
        for name, values in columns.items()
    }
    found = []
    for n, position in enumerate(at):
        mask = np.arange(position + 2) == position + 1
        one = {name: values[n] if name not in widths else values[n][None] for name, values in parts.items()}
        one |= {"loss_mask": mask, "token_ids": row["token_ids"][: position + 2]}
        found.append(unpack(one, vocabulary, tables, manifest))
    of_entries = {name: np.concatenate([one[name][0] for one in found]) for name in ("ids", "logits")}
    others = ("levels", "tail_logprobs", "entropies", "label_logits")
    return (
        row | of_entries | {name: np.concatenate([one[name] for one in found]) for name in others if name in found[0]}
    )


def unpack(row, vocabulary, tables, manifest):
    at = np.flatnonzero(row["loss_mask"][1:])
    codes, topics = row.pop("codes").astype(int), row.pop("topics")
    on_grid = manifest["max_kl_error"] > 0
    steps = np.ones(codes.shape, int)  # without a grid there are no runs
    if on_grid and manifest["top_k"] > 1:
        steps[:, 1:] = row.pop("steps")
    row["ids"] = np.array(
        [ids_of(*position, vocabulary) for position in zip(codes, steps, map(tables.__getitem__, topics))]
    )
    if on_grid:
        b = 0.6 / min(manifest["temperatures"])
        c = 1 - 1 / (128 * b)
        steps[:, 0] = 0
        h = np.cumsum(steps, axis=1) * 2.0 ** (-6 - row["levels"][:, None] / 2)
        curve, line = np.log(1 - np.minimum(h, c)) / b, np.log(1 / (128 * b)) / b - 128 * (h - c)
        row["logits"] = np.where(h < c, curve, line)
        with np.errstate(divide="ignore"):
            row["tail_logprobs"] = np.log(np.sin(row.pop("tails") * np.pi / 4096) ** 2)
        row["entropies"] = row.pop("nats") / 64
        is_label, absent = row["ids"] == row["token_ids"][at + 1][:, None], row.pop("label_steps") / -1024
        row["label_logits"] = np.where(is_label.any(axis=1), (row["logits"] * is_label).sum(axis=1), absent)
    return row


def ids_of(codes, steps, table, vocabulary):
    ids = []
    for k in range(len(codes)):
        codes[k] += codes[k - 1] if k > 1 and steps[k] == 0 else 0
        ids.append(table[codes[k]] if codes[k] < 2048 else vocabulary[codes[k] - 2048])
    return np.array(ids)[np.lexsort((ids, np.cumsum(steps != 0)))]


def probabilities(row, temperature, manifest):
    index = manifest["temperatures"].index(temperature)
    scaled, tails = row["logits"] / temperature, np.exp(row["tail_logprobs"][:, index])
    derived = np.log(np.exp(scaled).sum(axis=1)) - np.log1p(-tails)
    logsumexps = row["logsumexps"][:, index] if "logsumexps" in row else derived
    return np.exp(scaled - logsumexps[:, None])


def read_sketch(folder, manifest):
    contents = (folder / f"sketch-{manifest['sketch']}.safetensors").read_bytes()
    assert xxhash.xxh3_128_hexdigest(contents) == manifest["sketch"]
    start = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:start])
    tensors = {}
    for name in ("offset", "basis"):
        first, last = header[name]["data_offsets"]
        values = np.frombuffer(
            contents[start + first : start + last], {"F32": "f4", "F16": "f2"}[header[name]["dtype"]]
        )
        tensors[name] = values.reshape(header[name]["shape"]).astype(float)
    return tensors, json.loads(header["__metadata__"]["tail-sketch"])["softcap"]


def rebuilt(row, sketch, temperature, manifest):
    tensors, softcap = sketch
    s = tensors["offset"] + row["coefficients"].astype(float) @ tensors["basis"].T
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    np.put_along_axis(s, row["ids"].astype(int), -np.inf, axis=1)
    tails = np.exp(row["tail_logprobs"][:, manifest["temperatures"].index(temperature)].astype(float))
    shape = np.exp((s - s.max(axis=1, keepdims=True)) / temperature)
    whole = tails[:, None] * shape / shape.sum(axis=1, keepdims=True)
    np.put_along_axis(whole, row["ids"].astype(int), probabilities(row, temperature, manifest), axis=1)
    return whole


def checksum(row):
    return xxhash.xxh3_64_intdigest(b"".join(row[name].tobytes() for name in sorted(row) if name != "checksum"))


# It ends here.


@pytest.mark.parametrize("container", CONTAINERS)
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


@pytest.mark.parametrize("version", [1, 4])
def test_other_format_version_is_refused(tmp_path, corpus, version):
    folder = make_cache(tmp_path / "cache", corpus)
    path = folder / "manifest.json"
    document = read_json(path, ValueError) | {"format_version": version}
    path.unlink()
    write_json(path, document)
    with pytest.raises(CacheMismatchError, match=rf"manifest\.json.*{version}.*reads.*2 or 3"):
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


def zarr_shard(tmp_path, corpus):
    """Path of a Zarr shard."""
    folder = make_cache(tmp_path / "cache", corpus, container="zarr")
    return folder / SHARDS / open_cache(folder).commits[0].file


def test_zarr_reads_zarr_shards(tmp_path, corpus):
    path = zarr_shard(tmp_path, corpus)
    cache = open_cache(path.parent.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
        np.testing.assert_array_equal(group["token_ids"][: len(cache[0].token_ids)], cache[0].token_ids)
        assert group["codes"].shape == (cache.commits[0].num_targets, 8)
        assert group["codes"].metadata.codecs[0].to_dict()["name"] == "sharding_indexed"


@pytest.mark.slow
def test_zarrs_reads_unzipped_zarr_shards(tmp_path, corpus):
    zarrs = pytest.importorskip("zarrs", reason="zarrs is not installed; `make slow` does it")
    path = zarr_shard(tmp_path, corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's, on numcodecs' codecs
        group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
        expected = {name: array[:] for name, array in group.arrays()}
        zipfile.ZipFile(path).extractall(tmp_path / "shard.zarr")
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
            found = dict(zarr.open_group(tmp_path / "shard.zarr", mode="r").arrays())
            assert found.keys() == expected.keys()
            for name, array in found.items():
                assert isinstance(array.async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
                np.testing.assert_array_equal(array[:], expected[name], err_msg=name)
                np.testing.assert_array_equal(array[3:5], expected[name][3:5], err_msg=name)


@pytest.mark.slow
def test_tensorstore_reads_what_is_not_pcodec(tmp_path, corpus):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed; `make slow` does it")
    path = zarr_shard(tmp_path, corpus)
    store = {"driver": "zip", "base": {"driver": "file", "path": str(path)}}

    def read(name):
        spec = {"driver": "zarr3", "kvstore": store | {"path": f"{name}/"}}
        return tensorstore.open(spec, read=True).result()[:].read().result()

    cache = open_cache(path.parent.parent)
    rows = [cache[index] for index in range(cache.commits[0].num_sequences)]
    np.testing.assert_array_equal(read("loss_mask"), np.concatenate([row.loss_mask for row in rows]))
    assert [key.tobytes() for key in read("key")] == [row.key for row in rows]
    with pytest.raises(ValueError, match="pcodec"):
        read("codes")
