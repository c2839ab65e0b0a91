"""An object store that fails for a while: what is waited for, how long, what is said, and what each failure ends in."""

import errno
import json
import logging
import multiprocessing
import shutil
import threading
from unittest.mock import Mock

import numpy as np
import obstore.store
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS, list_commits
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheCorruptError, StorageError, StorageSilentError
from pipeline.runs.failures import list_failures
from pipeline.runs.leases import list_leases
from pipeline.stopping import stop_waiting
from pipeline.stores import client as store_client
from pipeline.stores import local_copies, patience
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import PATIENCE
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from tests.support.helpers import run, wait_until
from tests.support.object_store import put_cache
from tests.support.small import assert_equal_caches, llama_config, make_cache
from tests.support.workers import new_cache, run_worker, tiny_corpus
from tests.test_workers import SlowEngine

FOR_EVER = 10**9
COUNT = 24
LARGE = np.random.default_rng(0).bytes(12 << 20)
"""Two ranges of a download, three parts of an upload."""


@pytest.fixture(scope="module")
def local(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("local") / "cache", corpus)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("rows"), COUNT)


@pytest.fixture
def hurry(monkeypatch):
    """A client that gives up at once, so that what is tried again is tried by us; no pause lasts."""
    monkeypatch.setattr(patience, "CLIENT_S", 0.0)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.1)
    store_client.client.cache_clear()


REFUSED = [
    ("deny", "AccessDenied"),
    ("unknown", "InvalidAccessKeyId"),
    ("bucket", "there is no such bucket"),
]
DOUBTED = [
    ("expired", "the credentials have run out: give new ones and run the same command again"),
    ("expired403", "the credentials have run out"),
    ("skewed", "this machine's clock is wrong"),
    ("html", "without an ETag, which is none of an object store; look at the endpoint and at proxies in between"),
    ("html404", "look at the endpoint and at proxies in between"),
]
WAITED_FOR = ["500", "html503", "throttle", "timeout", "drop", "outage 1000"]


@pytest.mark.parametrize(
    ("command", "kind"),
    [("status", kind) for kind in [*dict(REFUSED + DOUBTED), *WAITED_FOR]]
    + [(command, kind) for command in ("verify", "export", "convert") for kind in ("expired", "outage 1000")],
)
def test_failure_that_lasts_is_one_line_and_an_exit_code(
    server, url, local, tmp_path, monkeypatch, hurry, kind, command
):
    monkeypatch.setenv(PATIENCE, "0.2")
    put_cache(local, url)
    server.fail((kind, "", url.name, FOR_EVER))
    options = {"export": ["--to", "parquet"], "convert": ["--format", "zarr"]}.get(command, [])
    out = ["--out", tmp_path / "out"] if options else []
    code, _, err = run(command, url, *options, *out)
    assert code == (75 if kind in WAITED_FOR else 2)
    assert err.count("\n") == 1
    assert err.startswith(f"error: {url}/manifest.json: cannot read it: ")
    assert dict(REFUSED + DOUBTED).get(kind, "run the same command again") in err
    if kind in dict(REFUSED):
        assert server.met()[0] <= 2  # the request, and the reason
    else:
        assert server.met()[0] > 1


@pytest.mark.parametrize("kind", [kind for kind, _ in DOUBTED] + WAITED_FOR[:-1] + ["outage 0.3", "conflict"])
def test_failure_that_passes_leaves_no_trace(server, url, local, hurry, kind):
    put_cache(local, url)
    server.fail(*[(kind, method, "/bucket", 3) for method in ("GET", "PUT", "HEAD", "POST")])
    assert_equal_caches(url, local)
    (url / "new").write(b"contents")
    assert (url / "lease").create(b"mine")
    assert (url / "lease").read() == b"mine"
    (url / "new").unlink()
    assert min(server.met()) >= 1
    server.fail()
    assert not (url / "new").is_file()


def test_credentials_that_have_run_out_are_looked_up_anew_with_every_try(server, url, monkeypatch, hurry):
    (url / "file").write(b"contents")
    made = Mock(wraps=obstore.store.from_url)
    monkeypatch.setattr(obstore.store, "from_url", made)
    server.fail(("expired", "GET", "file", 3))
    (url / "file").read()
    assert made.call_count == 3


def test_missing_bucket_is_named_by_every_command(server, local, rows, teacher, tmp_path, monkeypatch, hurry):
    nowhere = "s3://nowhere/cache"
    monkeypatch.setenv(PATIENCE, "1000")
    capture = ["cache-logits", "--teacher", teacher, "--corpus", rows, "--out", nowhere, "--engine", "transformers"]
    for command in (
        ["status", nowhere],
        ["verify", nowhere],
        ["verify", nowhere, "--repair"],
        ["convert", local, "--format", "zarr", "--out", nowhere],
        ["merge", local, local, "--out", nowhere],
        ["export", nowhere, "--to", "parquet", "--out", tmp_path / "out"],
        ["train-student", "--student", teacher, "--cache", nowhere, "--out", tmp_path / "student"],
        capture,
    ):
        code, out, err = run(*command)
        assert (code, "there is no such bucket" in out + err) == (2, True), command


def test_page_of_a_proxy_is_neither_an_empty_store_nor_damage(server, url, local, monkeypatch, hurry):
    monkeypatch.setenv(PATIENCE, "0.1")
    put_cache(local, url)
    for kind in ("html", "html404"):
        for method, part in (("GET", "/commits/"), ("GET", "/shards/"), ("", "/shards/"), ("", "/tokenizer")):
            shutil.rmtree(local_copies.copies_folder())
            server.fail((kind, method, part, FOR_EVER))
            code, _, err = run("verify", url, "--repair")
            assert code == 2
            assert err.splitlines()[-1].startswith("error: s3://bucket/")
        server.fail((kind, "", "/bucket", FOR_EVER))
        with pytest.raises(StorageError):
            list_commits(url)
    server.fail()
    assert verify_cache(url).problems == []


def test_silence_is_said_once_and_so_is_its_end(server, url, monkeypatch, hurry, caplog):
    monkeypatch.setattr(patience, "SAY_AFTER_S", 0.2)
    (url / "file").write(b"contents")
    server.fail(("outage 0.6", "", url.name, FOR_EVER))
    threads = [threading.Thread(target=(url / "file").read) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    (url / "file").read()
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"s3://bucket: does not answer: {url}/file: cannot read it: ")
    assert first.endswith("waiting up to 10m00s (LOGIT_CACHE_PATIENCE_S)")
    assert last.startswith("s3://bucket: answers again, after ")
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_hasty_request_asks_once_while_the_store_is_known_to_be_silent(server, url, monkeypatch, hurry):
    monkeypatch.setattr(patience, "SAY_AFTER_S", 0.1)
    hasty = ObjectStore(str(url), 20.0)
    server.fail(("500", "GET", "slow", FOR_EVER), ("500", "GET", "hasty", FOR_EVER))
    thread = threading.Thread(target=pytest.raises, args=(StorageSilentError, (url / "slow").read))
    monkeypatch.setenv(PATIENCE, "2")
    thread.start()
    wait_until(lambda: patience._silences["s3://bucket"].said)
    with pytest.raises(StorageSilentError):
        (hasty / "hasty").read()
    assert server.met()[1] == 1
    stop_waiting()
    thread.join()
    server.fail()
    assert not (url / "slow").is_file()


def test_request_that_waits_is_ended_by_an_interruption(server, url, monkeypatch, hurry):
    monkeypatch.setenv(PATIENCE, "100000")
    server.fail(("500", "GET", "file", FOR_EVER))
    arguments = (StorageSilentError, (url / "file").read)
    waiting = threading.Thread(target=pytest.raises, args=arguments, daemon=True)
    waiting.start()
    wait_until(lambda: server.met()[0] > 2)
    stop_waiting()
    wait_until(lambda: not waiting.is_alive())


@pytest.mark.parametrize("name", [PATIENCE, local_copies.COPIES_GB])
@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_settings_of_the_environment_are_numbers(url, local, monkeypatch, name, value):
    put_cache(local, url)
    monkeypatch.setenv(name, value)
    code, _, err = run("verify", url)
    assert code == 2
    assert f"{name} is {value!r}; expected a number, 0 or more" in err


@pytest.mark.parametrize("kind", ["reset 100000", "cut", "stall 1.5"])
def test_answer_that_breaks_off_is_asked_for_again(server, url, tmp_path, monkeypatch, hurry, kind):
    monkeypatch.setattr(store_client, "STALL_S", 0.3)
    (url / "large").write(LARGE)
    server.fail((kind, "GET", "large", 3))
    (url / "large").download(tmp_path / "copy", len(LARGE))
    assert server.met() == [3]
    assert (tmp_path / "copy").read_bytes() == LARGE


@pytest.mark.parametrize("request_of", [("PUT", "partNumber"), ("POST", "uploads"), ("POST", "uploadId")])
@pytest.mark.parametrize("kind", ["lose", "500", "outage 0.5", "upload"])
def test_upload_survives_a_fault_of_any_of_its_requests(server, url, tmp_path, hurry, kind, request_of):
    """Also when the answer to its last request is lost, after which the store knows of no such upload."""
    (tmp_path / "file").write_bytes(LARGE)
    server.fail((kind, *request_of, 1))
    (url / "large").publish(tmp_path / "file")
    assert server.met() == [1]
    assert (url / "large").read() == LARGE


@pytest.mark.slow
def test_slow_link_takes_longer_than_any_time_limit_of_an_answer(server, url, tmp_path, monkeypatch):
    """2 MB/s for all requests together, and 2 s without a byte allowed: 12 MiB up and down are 6 s each."""
    monkeypatch.setattr(store_client, "STALL_S", 2.0)
    store_client.client.cache_clear()
    (tmp_path / "file").write_bytes(LARGE)
    server.fail(("slow 2000000", "", "large", FOR_EVER))
    (url / "large").publish(tmp_path / "file")
    (url / "large").download(tmp_path / "copy", len(LARGE))
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert server.met()[0] == 2 + 3 + 1 + 2  # upload and its parts, size and ranges: none was asked for twice


def test_conflict_with_a_request_that_came_to_nothing_is_not_another_s_win(server, url, hurry):
    server.fail(("conflict", "PUT", "record", 2))
    assert (url / "record").create(b"mine")
    assert server.met() == [2]
    assert not (url / "record").create(b"theirs")


def _breaks_down(server, kind, url):
    """An engine that counts how often it is made; the store fails from its fourth answer on."""

    class Victim(SlowEngine):
        made = 0

        def __init__(self, manifest):
            super().__init__(manifest)
            type(self).made += 1

        def score(self, requests):
            for number, answer in enumerate(super().score(requests)):
                if number == 3:
                    server.fail((kind, "", url.name, FOR_EVER))
                yield answer

    return Victim


def test_worker_waits_out_an_outage_and_keeps_its_engine(server, url, rows, hurry):
    cache, engine = new_cache(url, rows), _breaks_down(server, "outage 1", url)
    run_worker(cache, rows, make_engine=engine, lease_s=0.8)  # which runs out meanwhile
    assert engine.made == 1
    assert server.met()[0] > 3
    assert verify_cache(cache).problems == []
    assert (list_failures(cache), list_leases(cache)) == ({}, {})
    assert len((cache / SHARDS).names()) == len((cache / COMMITS).names()) == COUNT


def test_worker_leaves_a_store_that_stays_silent_to_be_run_again(server, url, rows, monkeypatch, hurry):
    monkeypatch.setenv(PATIENCE, "0.3")
    cache = new_cache(url, rows)
    with pytest.raises(StorageSilentError, match="run the same command again") as left:
        run_worker(cache, rows, make_engine=_breaks_down(server, "outage 1000", url), lease_s=100.0)
    assert left.value.exit_code == 75
    server.fail()
    assert list_failures(cache) == {}
    assert len(list_commits(cache)) < COUNT
    run_worker(cache, rows, lease_s=100.0)
    assert verify_cache(cache).problems == []


def read_all(cache, results) -> None:
    results.put([sequence.key for sequence in cache])


def test_readers_wait_out_an_outage_forked_ones_too(server, url, local):
    put_cache(local, url)
    cache, results = open_cache(url), multiprocessing.get_context("fork").Queue()
    server.fail(("outage 0.5", "", SHARDS, FOR_EVER))
    reader = multiprocessing.get_context("fork").Process(target=read_all, args=(cache, results))
    reader.start()
    assert results.get(timeout=120) == [sequence.key for sequence in open_cache(local)]
    reader.join()
    assert server.met()[0] > 0


def test_training_waits_out_an_outage(server, url, local, tmp_path):
    put_cache(local, url)
    llama_config(open_cache(local).manifest.vocab_size, num_hidden_layers=1).save_pretrained(tmp_path / "student")
    server.fail(("outage 0.5", "", SHARDS, FOR_EVER))
    student = tmp_path / "student" / "config.json"
    train_student(TrainConfig(student=student, cache=url, out=tmp_path / "out", max_steps=2))
    assert server.met()[0] > 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 2


def open_first(cache, results) -> None:
    try:
        cache[0]
    except Exception as exc:
        results.put((type(exc).__name__, str(exc)))


@pytest.mark.parametrize(
    ("kind", "error"),
    [("outage 1000", "StorageSilentError"), ("deny", "StorageError"), ("absent", "CacheCorruptError")],
)
def test_forked_reader_meets_the_same_errors(server, url, local, monkeypatch, kind, error):
    monkeypatch.setenv(PATIENCE, "0.2")
    put_cache(local, url)
    cache, results = open_cache(url), multiprocessing.get_context("fork").Queue()
    if kind == "absent":
        for name in (url / SHARDS).names():
            (url / SHARDS / name).unlink()
    else:
        server.fail((kind, "", SHARDS, FOR_EVER))
    reader = multiprocessing.get_context("fork").Process(target=open_first, args=(cache, results))
    reader.start()
    name, message = results.get(timeout=120)
    reader.join()
    assert name == error
    assert str(url / SHARDS) in message
    assert "\n" not in message


def test_folder_of_copies_that_vanishes_is_made_again(url, local, monkeypatch):
    put_cache(local, url)
    download, gone = ObjectStore.download, []

    def vanishing(path, target, num_bytes):
        download(path, target, num_bytes)
        if not gone:
            gone.append(shutil.rmtree(local_copies.copies_folder()))

    monkeypatch.setattr(ObjectStore, "download", vanishing)
    assert_equal_caches(url, local)
    assert gone
    shutil.rmtree(local_copies.copies_folder())
    assert_equal_caches(url, local)


def test_full_disk_costs_the_copies_that_were_used_longest_ago_and_then_is_said(url, local, monkeypatch):
    put_cache(local, url)
    monkeypatch.setattr(local_copies, "JUST_USED_S", 0.0)
    room, download = 2 * max(commit.bytes for commit in open_cache(url).commits), ObjectStore.download

    def limited(path, target, num_bytes):
        kept = sum(
            copy.stat().st_size for copy in local_copies.copies_folder().iterdir() if not copy.name.startswith(".")
        )
        if kept + num_bytes > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        download(path, target, num_bytes)

    monkeypatch.setattr(ObjectStore, "download", limited)
    assert_equal_caches(url, local)
    room = 10
    with pytest.raises(StorageError, match=r"no copy of .*: No space left on device; make room there, or .*_DIR"):
        [sequence.key for sequence in open_cache(url)]


def test_shard_that_is_gone_is_damage_and_no_outage(url, local):
    put_cache(local, url)
    for name in (url / SHARDS).names():
        (url / SHARDS / name).unlink()
    with pytest.raises(CacheCorruptError, match="missing, although it was committed"):
        open_cache(url)[0]


def test_watch_goes_on_when_the_store_answers_again(server, url, rows, monkeypatch, hurry):
    monkeypatch.setenv(PATIENCE, "0.1")
    cache = new_cache(url, rows)
    run_worker(cache, rows, lease_s=100.0)
    server.fail(("outage 0.5", "GET", COMMITS, FOR_EVER))
    code, out, err = run("status", cache, "--watch", "--interval", "0.1", "--json")
    assert (code, json.loads(out)["state"]) == (0, "complete")
    assert "no answer for" in err
