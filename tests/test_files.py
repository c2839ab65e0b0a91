"""Files that are whole or not there, and JSON documents of which every byte is checked."""

import json

import pytest

from pipeline.errors import CorpusError
from pipeline.files import publish_first
from pipeline.processes import owner_is_dead, owner_name
from pipeline.stores.sealed import read_json, write_json

DOCUMENT = {
    "name": "中文",
    "sums": [0.1 + 0.2, 1234.5678901234567, 2 / 3],
    "empty": {},
    "checksum_of": 'a "checksum": "b',
}


def test_json_comes_back_and_is_plain_json(tmp_path):
    write_json(tmp_path / "a.json", DOCUMENT)
    assert read_json(tmp_path / "a.json", CorpusError) == DOCUMENT
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["sums"] == DOCUMENT["sums"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_flipped_bit_and_every_truncation_is_refused(tmp_path):
    """Also those that parse to the same value, such as the last digit of a float."""
    path = tmp_path / "a.json"
    write_json(path, DOCUMENT)
    contents = path.read_bytes()
    for position in range(len(contents)):
        for bit in range(8):
            damaged = bytearray(contents)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CorpusError, match=r"a\.json: its checksum"):
                read_json(path, CorpusError)
        path.write_bytes(contents[:position])
        with pytest.raises(CorpusError):
            read_json(path, CorpusError)


def test_first_writer_wins(tmp_path):
    assert write_json(tmp_path / "a.json", {"winner": 1}, first_wins=True)
    assert not write_json(tmp_path / "a.json", {"winner": 2}, first_wins=True)
    assert read_json(tmp_path / "a.json", CorpusError) == {"winner": 1}
    (tmp_path / "partial").write_text("late")
    assert not publish_first(tmp_path / "partial", tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_only_the_dead_of_this_host_are_dead():
    place = owner_name().rpartition(".")[0]
    assert not owner_is_dead(owner_name())
    assert owner_is_dead(f"{place}.{2**22 + 1}")
    assert not owner_is_dead(f"elsewhere.1.{2**22 + 1}")
    assert not owner_is_dead("no owner at all")
