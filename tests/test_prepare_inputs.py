"""stages.prepare: what is read, and what a user is told about input that cannot be read."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.errors import ConfigError, CorpusError
from pipeline.progress import KeptLines
from stages.prepare.inputs import Piece, describe
from stages.prepare.readers import read_records
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.helpers import tiny_tokenizer

RECORD = b'{"text": "something to read"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, tokenizer: Path) -> PrepareConfig:
    return PrepareConfig(inputs=(tmp_path,), tokenizer=tokenizer, out=tmp_path / "corpus", sequence_length=32)


def changed(config: PrepareConfig, **settings: Any) -> PrepareConfig:
    return PrepareConfig(**{**vars(config), **settings})


def one_file(config: PrepareConfig, tmp_path: Path, name: str, content: bytes, **settings: Any) -> PrepareConfig:
    path = tmp_path / name
    path.write_bytes(content)
    return changed(config, inputs=(path,), **settings)


def test_folders_are_searched_and_other_types_counted(config: PrepareConfig, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "c" / "deep.txt").write_text("deep text")
    (folder / "a.JSONL").write_bytes(RECORD)
    (folder / "notes.csv").write_text("ignored")
    manifest = prepare(changed(config, inputs=(folder,)))
    assert (manifest.statistics["files"], manifest.statistics["ignored_files"]) == (2, 1)
    assert [name for name, _, _ in manifest.settings["input_files"]] == ["tree/a.JSONL", "tree/b/c/deep.txt"]


def test_inputs_that_cannot_be_used_are_named(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such file"):
        prepare(changed(config, inputs=(tmp_path / "nowhere",)))
    with pytest.raises(ConfigError, match=r"data\.csv: not a type of input; expected one of: \.txt, \.jsonl"):
        prepare(one_file(config, tmp_path, "data.csv", b"a,b"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no input file"):
        prepare(changed(config, inputs=(tmp_path / "empty",)))
    with pytest.raises(ConfigError, match="lies inside the input"):
        prepare(changed(config, inputs=(tmp_path,)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3: not JSON"),
        (b'["text"]', "line 3: found a JSON list; expected an object"),
        (b'{"title": "t", "body": "b"}', "line 3: no field 'text'.*it has: title, body"),
        (b'{"text": 7}', "line 3: field 'text' holds a value of type int; expected a string"),
        (b'{"text": null}', "line 3: field 'text' holds null"),
        (b'{"text": "\\ud800"}', "line 3: .*half of a surrogate pair"),
        (b'{"text": "\xff"}', "line 3: byte 10 is 0xff; expected UTF-8"),
        (b'{"prompt": "p", "completion": []}', "line 3: field 'completion' holds a value of type list"),
        (b'{"messages": []}', "line 3: field 'messages' holds"),
        (b'{"messages": [{"role": "user"}]}', "line 3: `content` of message 1 holds null"),
    ],
)
def test_bad_record_is_named_or_counted(
    config: PrepareConfig, tmp_path: Path, name: str, line: bytes, message: str
) -> None:
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    strict = one_file(config, tmp_path, name, compress(RECORD + b"\n" + line + b'\n{"text": "another"}\n'))
    with pytest.raises(CorpusError, match=f"{name}: {message}.*--skip-bad-lines"):
        prepare(strict)
    reporter = KeptLines()
    manifest = prepare(changed(strict, skip_bad_lines=True), reporter)
    assert (manifest.statistics["bad_lines"], manifest.statistics["documents"]) == (1, 2)
    assert any(said.startswith("skipped: ") and "line 3" in said for said in reporter.lines)
    with pytest.raises(ConfigError, match="skip_bad_lines True, this run has False"):
        prepare(strict)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_broken_stream_is_an_error_even_if_bad_lines_are_skipped(
    config: PrepareConfig, tmp_path: Path, name: str, damage: str
) -> None:
    content = (gzip.compress if name.endswith("gz") else zstandard.compress)(RECORD * 100)
    content = content[:-5] if damage == "cut" else content + b"garbage"
    with pytest.raises(CorpusError, match=f"{name}: the compressed stream is damaged or cut off after line"):
        prepare(one_file(config, tmp_path, name, content, skip_bad_lines=True))


def test_text_file_that_is_not_utf8_names_line_and_byte(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"latin\.txt: line 2, byte 9 is 0xe9; expected UTF-8"):
        prepare(one_file(config, tmp_path, "latin.txt", b"line one\n\xe9t\xe9\n"))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_folder_of_save_to_disk_is_read(config: PrepareConfig, tmp_path: Path, kind: str) -> None:
    """The files that the datasets library writes, beside what it notes of them."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    table = pa.table({"id": list(range(3000)), "text": [f"row {number} of a set" for number in range(3000)]})
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with make(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    manifest = prepare(changed(config, inputs=(folder,)))
    assert manifest.statistics["documents"] == 3000
    (path,) = folder.glob("data-*.arrow")
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(CorpusError, match=r"data-00000-of-00001\.arrow: not a whole Arrow file"):
        prepare(changed(config, inputs=(folder,), out=tmp_path / "other"))
    path.unlink()
    with pa.OSFile(str(path), "wb") as sink:
        writer = pa.ipc.new_stream(sink, table.schema)
        writer.write_table(table)
        whole = sink.tell()  # before the mark of its end
        writer.close()
    with pytest.raises(CorpusError, match=r"no column 'body'.*its columns are: id, text"):
        prepare(changed(config, inputs=(folder,), out=tmp_path / "third", text_field="body"))
    path.write_bytes(path.read_bytes()[:whole])
    with pytest.raises(CorpusError, match="its end is missing"):
        prepare(changed(config, inputs=(folder,), out=tmp_path / "fourth"))


def test_parquet_without_the_column_lists_its_columns(config: PrepareConfig, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: no column 'text'.*its columns are: id, body.*--text-field"):
        prepare(changed(config, inputs=(tmp_path / "a.parquet",)))
    with pytest.raises(CorpusError, match=r"b\.parquet: not a whole Parquet file"):
        prepare(one_file(config, tmp_path, "b.parquet", b"PAR1 and no more"))


def test_nothing_left_is_an_error(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nothing to train on is left \(.*1 empty documents"):
        prepare(one_file(config, tmp_path, "empty.txt", b""))


BOMB = """
import resource, sys
from pathlib import Path
from pipeline.errors import CorpusError
from stages.prepare import readers
from stages.prepare.inputs import Piece, describe
from pipeline.progress import Reporter
readers.LONGEST_LINE = 32 << 20
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20),) * 2)
for name in sys.argv[1:]:
    try:
        list(readers.read_records(Piece.whole(describe(Path(name), name)), "text", readers.BadLines(True, Reporter())))
    except CorpusError as error:
        print(error)
"""


def test_compressed_bombs_end_with_a_line_and_in_little_memory(tmp_path: Path) -> None:
    """Two gigabytes in one line; frames that stand for much more than they hold; 300 MB of address space."""
    zeros = b"0" * (1 << 20)
    gz, zst, many = tmp_path / "bomb.jsonl.gz", tmp_path / "bomb.jsonl.zst", tmp_path / "many.jsonl.zst"
    member = gzip.compress(zeros, 1)
    gz.write_bytes(member * 2048)
    frame = zstandard.compress(bytes(64 << 20))
    zst.write_bytes(frame * 32)
    many.write_bytes(zstandard.compress(zeros * 64)[:-10])
    files = [str(path) for path in (gz, zst, many)]
    command = [sys.executable, "-c", BOMB, *files]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line, path in zip(lines, files, strict=True):
        assert line.startswith(f"{path}: line 1 has more than 33,554,432 bytes")


def test_hidden_and_linked_things_of_a_folder_are_read_once_or_named(config: PrepareConfig, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for name in ("tree/.cache/huggingface", "tree/data", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "tree/.cache/huggingface/x.txt",
        "tree/.hidden.txt",
        "tree/requirements.txt",
        "tree/a.csv",
        "tree/b.CSV",
    ):
        (tmp_path / name).write_text("not to be trained")
    for name in ("tree/data/one.txt", "elsewhere/deep/two.md", "elsewhere/three.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "a link").symlink_to(folder / "data")
    (folder / "data" / "up").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "same.txt").symlink_to(folder / "data" / "one.txt")
    reporter = KeptLines()
    manifest = prepare(changed(config, inputs=(folder,)), reporter)
    names = [name for name, _, _ in manifest.settings["input_files"]]
    assert "tree/data/one.txt" in names  # and not by a link's name
    assert len(names) == 3 == manifest.statistics["documents"]
    assert {name.rpartition("/")[2] for name in names} == {"one.txt", "two.md", "three.txt"}
    found = {
        name: manifest.statistics[name]
        for name in ("ignored_files", "hidden_names", "dangling_links", "repeated_files")
    }
    assert found == {"ignored_files": 3, "hidden_names": 2, "dangling_links": 1, "repeated_files": 4}
    assert "3 of other types: 2 .csv, 1 requirements.txt" in reporter.lines[0]
    assert "gone.txt" in reporter.lines[0]


def test_folder_of_other_types_lists_them(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for name in ("a.csv", "b.csv", "c.py", "noname"):
        (tmp_path / "tree" / name).write_text("x")
    with pytest.raises(CorpusError, match=r"no input file \(4 of other types: 2 \.csv, 1 \.py, 1 without a suffix\)"):
        prepare(changed(config, inputs=(tmp_path / "tree",)))


OBJECTS = ['{"text": "first"}', '{"text": "sec\\u00f6nd 🙂 ] } ,"}', '{"text": "third", "more": [1, {"a": "]"}]}']


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        "[" + ",".join(OBJECTS) + "]",
        "\ufeff [ \n" + " ,\n ".join(OBJECTS) + "\n]\n",
        "\n".join(OBJECTS),
        " ".join(OBJECTS),
    ],
)
def test_json_file_is_an_array_or_objects(
    config: PrepareConfig, tmp_path: Path, monkeypatch, content, read_bytes
) -> None:
    monkeypatch.setattr("stages.prepare.json_files.READ_BYTES", read_bytes)
    records = list(
        read_records(
            Piece.whole(describe(one_file(config, tmp_path, "a.json", content.encode()).inputs[0], "a")), "text", None
        )
    )
    assert [record.fields for record in records] == [json.loads(each) for each in OBJECTS]


def test_json_file_of_one_object_is_a_record(config: PrepareConfig, tmp_path: Path) -> None:
    manifest = prepare(one_file(config, tmp_path, "a.json", b'{\n  "text": "only one"\n}\n'))
    assert manifest.statistics["records"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}', r"a\.json: expected ',' at character 14"),
        (b'[{"text": "a"} {"text": "b"}]', r"a\.json: expected ',' at character 15"),
        (b'[{"text": "a"},]', r"a\.json: expected a value after the comma"),
        (b'[{"text": "a"}] x', r"a\.json: expected nothing behind the array"),
        (b'[{"text": "a', r"a\.json: expected JSON \(Unterminated string"),
        (b'[{"text": "\xff"}]', r"a\.json: byte 0xff; expected UTF-8"),
        (b"", "nothing to train on"),
    ],
)
def test_broken_json_file_is_an_error_even_if_bad_lines_are_skipped(config, tmp_path, content, message) -> None:
    with pytest.raises(CorpusError, match=message):
        prepare(one_file(config, tmp_path, "a.json", content, skip_bad_lines=True))


def test_record_of_a_json_array_that_is_no_object_is_rejected(config: PrepareConfig, tmp_path: Path) -> None:
    strict = one_file(config, tmp_path, "a.json", b'[{"text": "a"}, "b", {"text": "c"}]')
    with pytest.raises(CorpusError, match=r"a\.json: record 2: found a JSON str"):
        prepare(strict)
    assert prepare(changed(strict, skip_bad_lines=True)).statistics["bad_lines"] == 1
