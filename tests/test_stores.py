"""The contract of a store, which every one of them fulfils: a folder of this machine, S3, Azure."""

import hashlib
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import xxhash

from pipeline.errors import CacheCorruptError, ConfigError
from pipeline.files import PARTIAL
from pipeline.stores.local_copies import COPIES
from pipeline.stores.places import SCHEMES, store_of
from pipeline.stores.sealed import read_json, write_json
from pipeline.stores.store import Store
from tests.support import azurite

needs_azurite = pytest.mark.skipif(azurite.find() is None, reason="Azurite is not installed; `make slow` does it")


@pytest.fixture(scope="module")
def running_azurite():
    with azurite.running() as environment:
        yield environment


KINDS = {"local": [], "s3": [], "az": [pytest.mark.slow, needs_azurite]}
"""Folders, which have no scheme, and at least a scheme of every class in the table; with the marks of their tests."""


@pytest.fixture(params=[pytest.param(kind, marks=marks) for kind, marks in KINDS.items()])
def store(request, tmp_path, monkeypatch) -> Store:
    """A folder that no other test uses, with a name that is hard on URLs."""
    if request.param == "s3":
        request.getfixturevalue("server")
    elif request.param == "az":
        monkeypatch.setenv(COPIES, str(tmp_path / "copies"))
        for name, value in request.getfixturevalue("running_azurite").items():
            monkeypatch.setenv(name, value)
    root = tmp_path if request.param == "local" else f"{request.param}://bucket/{tmp_path.name}"
    folder = store_of(root) / "a 100% 文件夹"
    folder.mkdir()
    return folder


def at_once(count: int, work) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


def test_places(store):
    assert (store / "a" / "b.json").name == "b.json"
    assert (store / "a" / "b.json").parent == store / "a"
    assert str(store / "a") == f"{store}/a"
    assert store_of(str(store)) == store
    assert store_of(store) is store
    assert pickle.loads(pickle.dumps(store / "a")) == store / "a"
    assert len({store / "a", store / "a", store / "b"}) == 2
    assert (store.path is None) == ("://" in str(store))


def test_what_is_there(store):
    assert store.names() == []
    assert (store / "a").names() == []
    (store / "a").mkdir(exist_ok=True)
    (store / "a" / "one").write(b"1")
    (store / "b").write(b"22")
    assert store.names() == ["a", "b"]
    assert (store.is_dir(), store.is_file()) == (True, False)
    assert ((store / "b").is_dir(), (store / "b").is_file()) == (False, True)
    assert not (store / "a" / "two").is_file()
    assert not (store / "c").is_dir()
    assert store.hashes() == {"b": xxhash.xxh3_128_hexdigest(b"22")}


@pytest.mark.parametrize("lasting", [True, False])
def test_files_are_written_whole_and_read(store, lasting):
    path, before = store / "file", time.time()
    path.write(b"first", lasting=lasting)
    path.write(b"second", lasting=lasting)
    assert path.read() == b"second"
    assert path.read(at_most=5) is None
    contents, changed = path.read_dated()
    assert contents == b"second"
    assert abs(changed - before) < 60
    assert abs(path.changed_at() - changed) < 1
    assert store.names() == ["file"]
    assert path.hasty(5.0).read() == b"second"


def test_what_is_not_there(store):
    for ask in ((store / "no").read, (store / "no").changed_at, (store / "no").read_dated):
        with pytest.raises(FileNotFoundError):
            ask()
    assert (store / "no").read_end(10) == b""
    (store / "no").unlink(missing_ok=True)
    (store / "no").remove_tree()


@pytest.mark.parametrize("lasting", [True, False])
def test_of_many_that_create_a_file_one_does(store, lasting):
    wins = []
    at_once(12, lambda number: wins.append(((store / "file").create(b"%d" % number, lasting=lasting), number)))
    (winner,) = [number for version, number in wins if version is not None]
    assert (store / "file").read() == b"%d" % winner
    assert not [name for name in store.names() if name.endswith(PARTIAL)]


def test_renewing_sets_the_time_and_never_brings_back_what_is_gone(store):
    path = store / "lease"
    version = path.create(b"mine", lasting=False)
    created = path.changed_at()
    time.sleep(1.1)
    newest = path.renew(b"mine", version)
    assert newest is not None
    assert path.changed_at() > created
    assert path.read() == b"mine"
    assert path.renew(b"mine", newest) is not None
    path.unlink()
    assert path.renew(b"mine", newest) is None
    assert not path.is_file()


def test_documents_are_sealed(store):
    path = store / "document.json"
    assert write_json(path, {"a": 1}, first_wins=True)
    assert not write_json(path, {"a": 2}, first_wins=True)
    assert read_json(path, CacheCorruptError) == {"a": 1}
    assert write_json(path, {"a": 3})
    path.write(path.read().replace(b"3", b"4"))
    with pytest.raises(CacheCorruptError, match="its checksum does not match"):
        read_json(path, CacheCorruptError)


def test_finished_files_are_published_and_opened_here(store):
    contents = os.urandom(12 << 20)
    partial = store.workshop() / f"shard-0{PARTIAL}"
    partial.write_bytes(contents)
    (store / "shard").publish(partial)
    assert not partial.exists()
    checksum = xxhash.xxh3_128_hexdigest(contents)
    file = (store / "shard").as_file(checksum, len(contents), check=True)
    assert isinstance(file, Path)
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(contents).digest()
    with pytest.raises(ValueError, match="bytes"):
        (store / "shard").as_file(checksum, len(contents) + 1, check=False)
    with pytest.raises(ValueError, match="checksum"):
        (store / "shard").as_file("0" * 32, len(contents), check=True)
    with pytest.raises(FileNotFoundError):
        (store / "other").as_file(checksum, 8, check=False)


def test_folder_comes_into_being_whole(store):
    """Of two that make it at the same time one is first, and the other finds it."""

    def fill(new: Store) -> None:
        (new / "data").write(b"contents")
        (new / "manifest").write(b"whole")

    new = store / "new"
    at_once(2, lambda number: new.build(fill))
    assert new.names() == ["data", "manifest"]
    assert (new / "manifest").read() == b"whole"
    assert store.names() == ["new"]
    new.remove_tree()
    assert not new.is_dir()
    assert new.names() == []
    store.sync()


def test_folder_is_copied_to_this_machine(store, tmp_path):
    (store / "config.json").write(b"{}")
    (store / "model.bin").write(b"\x00\x01")
    folder = store.as_folder(tmp_path / "scratch")
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", "model.bin"]
    assert (folder / "model.bin").read_bytes() == b"\x00\x01"


def test_log_grows(store):
    for number in range(2):
        log = (store / "0000-me.jsonl").log()
        log.append(b"line %d\n" % number)
        log.flush()
        log.append(b"more\n")
        log.flush()
        log.close()
        time.sleep(0.01)  # objects are named by the millisecond
    lines = b"".join((store / name).read_end(1 << 20) for name in store.names()).splitlines()
    assert [line for line in lines if line] == [b"line 0", b"more", b"line 1", b"more"]


def test_room_is_told_where_it_is_known(store):
    room = store.free_bytes()
    assert room is None if store.path is None else room > 0


@pytest.mark.parametrize("url", ["ftp://host/folder", "s3://", "http://host/file", "s3:///key"])
def test_urls_of_nothing_are_refused(url):
    with pytest.raises(ConfigError):
        store_of(url)


def test_every_class_in_the_table_of_schemes_is_held_to_the_contract():
    held = {SCHEMES[scheme] for scheme in KINDS if scheme in SCHEMES}
    assert set(SCHEMES.values()) == held
    assert all(issubclass(kind, Store) for kind in held)
