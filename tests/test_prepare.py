"""stages.prepare: the run. Duplicates, resuming after a crash, and which folders are written to."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.commits import list_commits
from pipeline.corpus import Corpus, CorpusManifest
from pipeline.errors import ConfigError, CorpusError
from pipeline.processes import owner_name
from pipeline.progress import KeptLines
from stages.prepare import run, tasks
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from stages.prepare.staging import FinishedTask
from tests.support.helpers import tiny_tokenizer

UNIT = 12_000
"""Bytes: one of the files, not two."""
RECORD = b'{"text": "something to read"}\n'


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Seven files, each with one document that every file has and pieces that repeat inside a document."""
    folder = tmp_path / "input"
    folder.mkdir()
    for index in range(7):
        texts = [f"document {index} {item} " * (item + 1) for item in range(30)]
        lines = [{"text": text} for text in [*texts, "the same everywhere", "ab" * 500]]
        (folder / f"{index}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def config(tmp_path: Path, inputs: Path, tokenizer: Path) -> PrepareConfig:
    return PrepareConfig(
        inputs=(inputs,),
        tokenizer=tokenizer,
        out=tmp_path / "corpus",
        sequence_length=32,
        partition_tokens=1500,
        workers=1,
    )


def changed(config: PrepareConfig, **settings: Any) -> PrepareConfig:
    return PrepareConfig(**{**vars(config), **settings})


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "corpus.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_every_key_occurs_once_and_duplicates_are_counted(config: PrepareConfig) -> None:
    reporter = KeptLines()
    manifest = prepare(config, reporter)
    keys = [row.key for row in Corpus(config.out).rows()]
    assert len(set(keys)) == len(keys) == manifest.num_sequences
    assert manifest.statistics["duplicate_documents"] == 12
    assert manifest.statistics["documents"] == 7 * 30 + 2
    assert manifest.statistics["duplicate_sequences"] > 0
    assert "12 duplicate documents" in reporter.lines[-1]


def test_partitions_hold_at_most_partition_tokens(config: PrepareConfig) -> None:
    manifest = prepare(config)
    assert len(manifest.partitions) > 7
    assert all(partition.num_tokens <= 1500 for partition in manifest.partitions)
    assert [partition.file for partition in manifest.partitions] == sorted(files_of(config.out / "partitions"))


@pytest.mark.parametrize("packing", ["isolated", "crossing"])
def test_interrupted_run_goes_on_to_the_same_corpus(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    config = changed(config, packing=packing)
    whole = prepare(changed(config, out=config.out.with_name("whole")), unit_bytes=UNIT)
    commit = FinishedTask.commit
    done: list[int] = []

    def crash_after_commit(task: FinishedTask, folder: Any, number: int) -> Any:
        done.append(number)
        commit(task, folder, number)
        raise Crash

    monkeypatch.setattr(FinishedTask, "commit", crash_after_commit)
    for _ in range(16):  # units tokenised, documents compared, units packed, rows compared
        with pytest.raises(Crash):
            prepare(config, unit_bytes=UNIT)
        assert not (config.out / "corpus.json").exists()
    monkeypatch.undo()
    resumed = prepare(config, unit_bytes=UNIT)
    assert done == list(range(16))
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.statistics == whole.statistics
    assert files_of(config.out) == files_of(config.out.with_name("whole"))


def test_crash_inside_a_unit_redoes_that_unit(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(changed(config, out=config.out.with_name("whole")), unit_bytes=UNIT)
    calls = 0

    def crash_after_three(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            owner = owner_name().rpartition(".")[0]
            (config.out / "partitions" / f"00003-000.arrow.0123abcd.{owner}.999999999.partial").write_bytes(b"torn")
            raise Crash
        return write_partition(*arguments)

    write_partition = tasks.write_partition
    monkeypatch.setattr(tasks, "write_partition", crash_after_three)
    with pytest.raises(Crash):
        prepare(config, unit_bytes=UNIT)
    monkeypatch.undo()
    assert prepare(config, unit_bytes=UNIT).fingerprint == whole.fingerprint
    assert files_of(config.out) == files_of(config.out.with_name("whole"))


def test_mended_input_keeps_the_other_units(config: PrepareConfig, inputs: Path) -> None:
    path = inputs / "4.jsonl"
    good = path.read_bytes()
    path.write_bytes(good + b"{broken\n")
    with pytest.raises(CorpusError, match=r"4\.jsonl: line 33: not JSON"):
        prepare(config, unit_bytes=UNIT)
    assert list_commits(config.out / "units") == {0, 1, 2, 3}
    path.write_bytes(good)
    whole = prepare(changed(config, out=config.out.with_name("whole")), unit_bytes=UNIT)
    assert prepare(config, unit_bytes=UNIT).fingerprint == whole.fingerprint


def test_finished_corpus_is_returned_as_it_is(config: PrepareConfig) -> None:
    first = prepare(config)
    before = files_of(config.out)
    reporter = KeptLines()
    assert prepare(config, reporter) == first == CorpusManifest.read(config.out)
    assert "already finished" in reporter.lines[-1]
    assert files_of(config.out) == before
    assert not (config.out / "units").exists()


def test_moved_and_renamed_folders_are_the_same(config: PrepareConfig, inputs: Path, tmp_path: Path) -> None:
    manifest = prepare(config)
    (tmp_path / "elsewhere").mkdir()
    moved = {"inputs": (inputs.rename(tmp_path / "elsewhere" / "text"),), "out": tmp_path / "elsewhere" / "tokens"}
    config.out.rename(moved["out"])
    assert prepare(changed(config, **moved)) == manifest
    (tmp_path / "elsewhere" / "text" / "3.jsonl").rename(tmp_path / "elsewhere" / "text" / "9.jsonl")
    with pytest.raises(ConfigError, match="differs"):
        prepare(changed(config, **moved))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sequence_length", 64), ("packing", "none"), ("text_field", "body"), ("partition_tokens", 9)],
)
def test_other_settings_are_named(config: PrepareConfig, setting: str, value: Any) -> None:
    prepare(config)
    with pytest.raises(ConfigError, match=f"was made with {setting} .* this run has {value!r}"):
        prepare(changed(config, **{setting: value}))


def test_other_tokenizer_and_other_inputs_are_named(config: PrepareConfig, inputs: Path, tmp_path: Path) -> None:
    prepare(config)
    tiny_tokenizer(tmp_path / "other", vocab_size=300)
    with pytest.raises(ConfigError, match="tokenizer_vocab_size"):
        prepare(changed(config, tokenizer=tmp_path / "other"))
    (inputs / "3.jsonl").write_bytes(RECORD)
    with pytest.raises(ConfigError, match=r"input/3\.jsonl differs"):
        prepare(config)


def test_settings_may_change_while_nothing_is_finished(config: PrepareConfig) -> None:
    with pytest.raises(CorpusError, match=r"0\.jsonl: line 1: no field 'body'.*it has: text.*--text-field"):
        prepare(changed(config, text_field="body"))
    prepare(config)


def test_foreign_folder_is_left_alone(config: PrepareConfig) -> None:
    config.out.mkdir()
    (config.out / "thesis.doc").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files, such as thesis\.doc"):
        prepare(config)
    assert [path.name for path in config.out.iterdir()] == ["thesis.doc"]


def test_second_process_is_turned_away(config: PrepareConfig) -> None:
    with run._alone(config), pytest.raises(ConfigError, match="another `pipeline prepare` writes there"):
        prepare(config)


def test_input_that_grows_meanwhile_is_an_error(config: PrepareConfig, inputs: Path) -> None:
    class Grow(KeptLines):
        def progress(self, *rest: Any) -> Any:
            with (inputs / "0.jsonl").open("ab") as file:
                file.write(RECORD)
            return super().progress(*rest)

    with pytest.raises(CorpusError, match=r"0\.jsonl: changed while it was read"):
        prepare(config, Grow())


def test_callers_from_python_hear_what_is_skipped(config: PrepareConfig, caplog: pytest.LogCaptureFixture) -> None:
    (config.inputs[0] / "6.jsonl").write_text('{"text": "whole"}\n{"text": \n')
    prepare(changed(config, skip_bad_lines=True))
    heard = [record.getMessage() for record in caplog.records if record.name == "pipeline"]
    assert [line.startswith("skipped") for line in heard] == [True, True]
    assert "6.jsonl" in heard[0]
