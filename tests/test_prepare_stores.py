"""stages.prepare from an object store and into one, and a capture that reads its corpus there."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.reader import open_cache
from pipeline.cli import main
from pipeline.corpus import Corpus, CorpusManifest
from pipeline.errors import ConfigError, CorpusError
from pipeline.stores.local_copies import COPIES
from pipeline.stores.object_store import ObjectStore
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import CacheConfig
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.helpers import tiny_tokenizer
from tests.support.object_store import Server

UNIT = 4000


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Files of several types, in folders."""
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    texts = [f"document {number} of them " * (number % 7 + 1) for number in range(200)]
    lines = [json.dumps({"text": each}).encode() for each in texts]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines[:90]))
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[80:120])))
    pq.write_table(pa.table({"text": texts[120:]}), folder / "deep" / "c.parquet", row_group_size=20)
    (folder / "d.txt").write_text("alone")
    (folder / "e.json").write_text(json.dumps([{"text": "in an array"}, {"text": "of two"}]))
    (folder / "table.csv").write_text("1,2")
    return folder


@pytest.fixture
def config(tmp_path: Path, text: Path) -> PrepareConfig:
    tiny_tokenizer(tmp_path / "tokenizer")
    common = {"tokenizer": tmp_path / "tokenizer", "sequence_length": 32, "partition_tokens": 1500, "workers": 1}
    return PrepareConfig(inputs=(text,), out=tmp_path / "corpus", **common)


def upload(folder: Path, place: ObjectStore) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            target = place
            for part in path.relative_to(folder).parts:
                target = target / part
            target.write(path.read_bytes())


def test_text_in_a_store_becomes_the_corpus_of_the_same_files(
    config: PrepareConfig, text: Path, url: ObjectStore
) -> None:
    local = prepare(config, unit_bytes=UNIT)
    upload(text, url.parent / "text")
    far = replace(config, inputs=(url.parent / "text",), out=url.parent / "corpus")
    manifest = prepare(far, unit_bytes=UNIT)
    assert [row.key for row in Corpus(far.out).rows()] == [row.key for row in Corpus(config.out).rows()]
    assert manifest.fingerprint == local.fingerprint
    assert manifest.statistics == local.statistics
    assert [name for name, _, _ in manifest.settings["input_files"]] == [
        name for name, _, _ in local.settings["input_files"]
    ]
    assert (far.out / "units").names() == []
    assert prepare(far) == manifest  # finished


def test_changed_and_missing_objects_are_named(config: PrepareConfig, text: Path, url: ObjectStore) -> None:
    place = url.parent / "text"
    with pytest.raises(ConfigError, match=f"{place}: no such file"):
        prepare(replace(config, inputs=(place,)))
    upload(text, place)
    with pytest.raises(ConfigError, match="lies inside the input"):
        prepare(replace(config, inputs=(place,), out=place / "corpus"))
    (place / "a.jsonl").write(b'{"text": "one"}\n{broken\n')
    with pytest.raises(CorpusError, match=r"s3://.*a\.jsonl: line 2: not JSON"):
        prepare(replace(config, inputs=(place,)))


def test_store_that_fails_now_and_then_changes_nothing(
    config: PrepareConfig, text: Path, url: ObjectStore, server: Server
) -> None:
    local = prepare(config, unit_bytes=UNIT)
    upload(text, url.parent / "text")
    server.fail(("500", "GET", "text", 3), ("500", "PUT", "staged", 2))
    manifest = prepare(replace(config, inputs=(url.parent / "text",), out=url.parent / "corpus"), unit_bytes=UNIT)
    assert manifest.fingerprint == local.fingerprint


def test_capture_reads_its_corpus_in_a_store(
    teacher: Path, corpus: Path, url: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = url.parent / "corpus"
    upload(corpus, place)
    config = CacheConfig(
        teacher=teacher, corpus=place, out=tmp_path / "cache", engine="transformers", top_k=8, shard_tokens=200
    )
    cache_logits(config)
    assert [sequence.key for sequence in open_cache(config.out)] == [row.key for row in Corpus(corpus).rows()]
    (place / "partitions" / CorpusManifest.read(place).partitions[0].file).write(b"other bytes")
    monkeypatch.setenv(COPIES, str(tmp_path / "no copies yet"))
    with pytest.raises(CorpusError, match=r"s3://.*checksum"):
        list(Corpus(place).rows())


def test_status_of_a_corpus_in_a_store(config: PrepareConfig, text: Path, url: ObjectStore, capsys) -> None:
    far = replace(config, out=url.parent / "corpus")
    prepare(far)
    with pytest.raises(SystemExit) as leaving:
        main(["status", str(far.out)])
    assert leaving.value.code == 0
    assert "complete" in capsys.readouterr().out
