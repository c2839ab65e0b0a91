"""stages.prepare: what is read, and what a user is told about input that cannot be read."""

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.config import PrepareConfig
from pipeline.errors import ConfigError, CorpusError
from stages.prepare import prepare
from tests.helpers import Lines, tiny_tokenizer

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
    (folder / "notes.md").write_text("ignored")
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
    reporter = Lines()
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
from stages.prepare.inputs import describe
from pipeline.progress import Reporter
readers.LONGEST_LINE = 32 << 20
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20),) * 2)
for name in sys.argv[1:]:
    try:
        list(readers.read_records(describe(Path(name), name), "text", readers.BadLines(True, Reporter())))
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
