"""stages.prepare by several processes: the same bytes whatever the number of workers, the kills and the order."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.commits import list_commits
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, CorpusError
from pipeline.progress import KeptLines
from pipeline.stores.local_store import LocalStore
from stages.prepare.duplicates import Duplicates, find_duplicates
from stages.prepare.inputs import divide, find_inputs
from stages.prepare.readers import BadLines, read_records
from stages.prepare.run import prepare
from stages.prepare.settings import PACKINGS, PrepareConfig
from stages.prepare.staging import FinishedTask, write_keys, write_staged
from tests.support.helpers import tiny_tokenizer

ROOT = Path(__file__).parent.parent
UNIT = 3000
OTHERS = [name for name in PACKINGS.names if name != "isolated"]
SCRIPT = """
import sys
from pathlib import Path
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
if __name__ == "__main__":
    text, tokenizer, out, workers = sys.argv[1:]
    prepare(PrepareConfig(inputs=(Path(text),), tokenizer=Path(tokenizer), out=Path(out), sequence_length=32,
        partition_tokens=1500, workers=int(workers)), unit_bytes=3000)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all sizes; documents and long pieces that come again in others."""
    folder, choose = tmp_path_factory.mktemp("text") / "input", random.Random(0)
    folder.mkdir()
    long = "".join(choose.choice("abcdefgh ") for _ in range(2000))
    for index, count in enumerate((100, 3, 40, 1, 250)):
        texts = [f"document {choose.randrange(300)} " * choose.randrange(1, 12) for _ in range(count)]
        lines = [json.dumps({"text": each}) for each in [*texts, f"{long}{index}", "the same everywhere"]]
        (folder / f"{index}.jsonl").write_text("\n".join(lines) + "\n" * (index % 2))
    (folder / "z.txt").write_text("the same everywhere")
    return folder


@pytest.fixture
def config(tmp_path: Path, text: Path, tokenizer: Path) -> PrepareConfig:
    return PrepareConfig(
        inputs=(text,),
        tokenizer=tokenizer,
        out=tmp_path / "corpus",
        sequence_length=32,
        partition_tokens=1500,
        workers=1,
    )


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files of a corpus, but of what names the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    manifest = json.loads(found.pop("corpus.json"))
    manifest["settings"].pop("out")
    manifest.pop("checksum")
    found["corpus.json"] = json.dumps(manifest).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


@pytest.mark.parametrize("packing", ["isolated", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_two_workers_write_the_bytes_of_one(config: PrepareConfig, packing: str) -> None:
    config = replace(config, packing=packing)
    prepare(config, unit_bytes=UNIT)
    two = replace(config, out=config.out.with_name("two"), workers=2)
    reporter = KeptLines()
    prepare(two, reporter, unit_bytes=UNIT)
    assert contents(two.out) == contents(config.out)
    assert "sequences" in reporter.lines[-1]
    assert not (two.out / "units").exists()


@pytest.mark.parametrize("packing", PACKINGS.names)
def test_every_document_and_row_is_there_once_and_the_first_of_equals_stays(
    config: PrepareConfig, text: Path, packing: str
) -> None:
    manifest = prepare(replace(config, packing=packing), unit_bytes=UNIT)
    documents = [
        json.loads(line)["text"] for path in sorted(text.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    distinct = list(dict.fromkeys([*documents, "the same everywhere"]))
    assert manifest.statistics["documents"] == len(distinct)
    assert manifest.statistics["duplicate_documents"] == len(documents) + 1 - len(distinct)
    rows = list(Corpus(config.out).rows())
    assert len({row.key for row in rows}) == len(rows)
    if packing == "none":  # cut by hand, rows that came before left out
        whole = prepare(replace(config, packing=packing, out=config.out.with_name("whole")), unit_bytes=1 << 30)
        assert whole.statistics["duplicate_sequences"] == manifest.statistics["duplicate_sequences"] > 0
        assert [row.key for row in rows] == [row.key for row in Corpus(config.out.with_name("whole")).rows()]


def test_killed_workers_and_commands_change_nothing(config: PrepareConfig, text: Path, tokenizer: Path) -> None:
    prepare(config, unit_bytes=UNIT)
    out, choose = config.out.with_name("killed"), random.Random(1)
    script = config.out.with_name("script.py")
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), *map(str, (text, tokenizer, out)), "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = 0
    for attempt in range(8):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        if attempt < 4:
            while process.poll() is None and not _busy(process.pid):
                time.sleep(0.02)
            time.sleep(choose.random() * 0.4)
            victims = [process.pid] if attempt % 2 else _workers(process.pid)[:1]
            for pid in victims:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        process.wait()
        if process.returncode == 0:
            break
    assert process.returncode == 0
    assert killed > 0
    assert contents(out) == contents(config.out)


def _workers(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def _busy(pid: int) -> bool:
    """Whether workers are past their imports."""
    return any(psutil.Process(worker).num_threads() > 2 for worker in _workers(pid) if psutil.pid_exists(worker))


def test_bad_record_of_any_worker_is_named_with_its_line(config: PrepareConfig, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    lines = [json.dumps({"text": f"line {number} " * 20}) for number in range(1, 101)]
    lines[86] = "{broken"
    (folder / "a.jsonl").write_text("\n".join(lines))
    bad = replace(config, inputs=(folder,), workers=2)
    with pytest.raises(CorpusError, match=r"a\.jsonl: line 87: not JSON.*--skip-bad-lines"):
        prepare(bad, unit_bytes=UNIT)
    reporter = KeptLines()
    manifest = prepare(replace(bad, skip_bad_lines=True), reporter, unit_bytes=UNIT)
    assert manifest.statistics["bad_lines"] == 1
    assert manifest.statistics["documents"] == 99
    assert any("line 87: not JSON" in line for line in reporter.lines)


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000])
def test_pieces_of_a_file_have_its_lines_once_with_their_numbers(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    values = ["", "é" * 40, "x", *map(str, range(30)), "y" * 300]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps({"text": each}).encode() for each in values))
    file = find_inputs((path,), None).files
    records = [record for unit in divide(file, unit_bytes) for piece in unit for record in _records(piece)]
    assert [record.fields["text"] for record in records] == values
    assert [str(record.where) for record in records] == [f"{path}: line {1 + 2 * n}" for n in range(len(values))]


def test_row_groups_of_a_parquet_file_are_read_once_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = [f"row {number} " * (number % 9) for number in range(500)]
    pq.write_table(pa.table({"text": values}), path, row_group_size=40)
    file = find_inputs((path,), None).files
    units = divide(file, path.stat().st_size // 5)
    records = [record for unit in units for piece in unit for record in _records(piece)]
    assert len(units) > 4
    assert [record.fields["text"] for record in records] == values
    assert [str(record.where) for record in records] == [f"{path}: row {n}" for n in range(1, 501)]


def _records(piece: Any) -> Iterator[Any]:
    return read_records(piece, "text", BadLines(False, KeptLines()))


def test_a_file_that_grows_and_files_behind_leave_the_units_before(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b"x" * 1050)
    before = divide(find_inputs((first,), None).files, 100)
    first.write_bytes(b"x" * 2000)
    second.write_bytes(b"y" * 10)
    after = divide(find_inputs((first, second), None).files, 100)
    ranges = [[(piece.start, piece.stop) for piece in unit] for unit in before]
    assert [[(piece.start, piece.stop) for piece in unit] for unit in after][:10] == ranges[:10]


@pytest.mark.parametrize("merge_keys", [1, 50, 10**6])
@pytest.mark.parametrize("buckets", [1, 3, 16])
def test_duplicates_are_all_but_the_first(tmp_path: LocalStore, merge_keys: int, buckets: int) -> None:
    (tmp_path / "staged").mkdir()
    random_ = np.random.default_rng(0)
    pool = [random_.bytes(16) for _ in range(200)] + [bytes(16), b"\xff" * 16, b"\x01" + bytes(15)]
    units = [[pool[index] for index in random_.permutation(len(pool))[:size]] for size in (90, 0, 150, 1, 120)]
    staged = [
        write_staged(tmp_path, number, "keys", lambda path, unit=unit: write_keys(path, unit))
        for number, unit in enumerate(units)
    ]
    found = [find_duplicates(tmp_path, 9 + b, b, buckets, staged, merge_keys) for b in range(buckets)]
    duplicates, seen = Duplicates(tmp_path, found), set()
    for number, unit in enumerate(units):
        expected = [place for place, key in enumerate(unit) if key in seen]
        seen.update(unit)
        assert duplicates.of(number).tolist() == expected
    assert sum(task.statistics["duplicates"] for task in found) == sum(map(len, units)) - len(seen)


def test_damaged_staged_tokens_are_noticed(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = FinishedTask.commit

    def damage(task: FinishedTask, folder: LocalStore, number: int) -> bool:
        done = commit(task, folder, number)
        if number == 3:
            path = next((folder / "staged").glob("00003-*.documents"))
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        return done

    monkeypatch.setattr(FinishedTask, "commit", damage)
    with pytest.raises(CorpusError, match=r"00003-.*checksum"):
        prepare(config, unit_bytes=UNIT)
    assert 3 in list_commits(config.out / "units")


def _sourced(folder: Path, kind: str) -> Path:
    records = [{"text": f"record {n}", "from": "web" if n % 4 else "books", "id": n} for n in range(2000)]
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=100)
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sources_are_counted_and_a_share_of_one_is_taken(config: PrepareConfig, tmp_path: Path, kind: str) -> None:
    config = replace(config, inputs=(_sourced(tmp_path, kind),), source_field="from")
    manifest = prepare(config, unit_bytes=UNIT)
    assert {name: sums[0] for name, sums in manifest.settings["sources"].items()} == {"books": 500, "web": 1500}
    some = replace(config, out=tmp_path / "some", source_weights=("web=0.25",))
    fewer = prepare(some, unit_bytes=UNIT)
    documents = {name: sums[0] for name, sums in fewer.settings["sources"].items()}
    assert documents["books"] == 500
    assert abs(documents["web"] - 375) < 6 * (1500 * 0.25 * 0.75) ** 0.5
    assert fewer.statistics["left_out_by_weight"] == 1500 - documents["web"]
    whole = prepare(replace(some, out=tmp_path / "whole"), unit_bytes=1 << 30)  # whatever the units
    assert whole.settings["sources"] == fewer.settings["sources"]
    assert sum(tokens for _, tokens in fewer.settings["sources"].values()) < manifest.num_tokens


def test_files_are_sources_unless_a_field_names_them(config: PrepareConfig, text: Path) -> None:
    manifest = prepare(config, unit_bytes=UNIT)
    assert list(manifest.settings["sources"]) == [f"input/{index}.jsonl" for index in range(5)]
    assert sum(documents for documents, _ in manifest.settings["sources"].values()) == manifest.statistics["documents"]


def test_sources_that_cannot_be_meant_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    for given in ("web", "web=", "web=2", "=0.5", "web=nan"):
        with pytest.raises(ConfigError, match=f"source_weights has '{given}'"):
            replace(config, source_weights=(given,))
    with pytest.raises(CorpusError, match=r"line 1: field 'id' names no source.*found 0"):
        prepare(replace(config, inputs=(_sourced(tmp_path, "jsonl"),), source_field="id"))
