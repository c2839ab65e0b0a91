"""Many workers on one cache in an object store: what holds in a folder holds there, and while the store fails."""

import json
import os
import signal
import time
from random import Random

import pytest

from pipeline.cache.commits import SHARDS, list_commits
from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import PartitionsFailedError, StorageError
from pipeline.runs.ephemeral import EphemeralFiles
from pipeline.runs.failures import forget_failures, list_failures, read_failure
from pipeline.runs.heartbeat import WORKERS, Heartbeat
from pipeline.runs.leases import LEASES, Leases, list_leases
from pipeline.runs.rank import Rank
from pipeline.stores.numbered import list_names
from pipeline.stores.patience import PATIENCE
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.helpers import run, wait_until
from tests.support.object_store import end_of_store_worker, start_store_worker
from tests.support.workers import ALONE, new_cache, run_worker, tiny_corpus
from tests.test_workers import COUNT, AllergicEngine, HangingEngine, SlowEngine

LEASE_S = 4.0
"""A store's times are whole seconds."""
LONG_S = 120.0
"""A lease that does not expire in a test."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A corpus of 24 sequences, one a partition."""
    return tiny_corpus(tmp_path_factory.mktemp("rows"), COUNT)


@pytest.fixture
def cache(url, rows):
    """Its plan."""
    return new_cache(url, rows)


def assert_whole(url, corpus) -> None:
    """Every sequence once and in order, nothing damaged, no lease left, no shard that no record names."""
    assert verify_cache(url).problems == []
    assert [sequence.key for sequence in open_cache(url)] == [sequence.key for sequence in Corpus(corpus).rows()]
    assert list_leases(url) == {}
    assert len(list_names(url / SHARDS)) == COUNT


@pytest.fixture(params=["folder", "store"])
def place(request, tmp_path):
    """A folder for notes, of either kind."""
    if request.param == "store":
        return request.getfixturevalue("url")
    (tmp_path / LEASES).mkdir()
    (tmp_path / WORKERS).mkdir()
    return tmp_path


def test_notes_are_made_once_renewed_while_they_are_there_replaced_and_removed(place):
    ours, theirs = EphemeralFiles(place / LEASES), EphemeralFiles(place / LEASES)
    assert ours.create("1.1", "ours")
    assert not theirs.create("1.1", "theirs")
    assert ours.read("1.1").text == "ours"
    before = ours.read("1.1").time
    wait_until(lambda: ours.renew("1.1") and ours.read("1.1").time > before)
    theirs.remove("1.1")
    assert not ours.renew("1.1")
    assert ours.read("1.1") is None
    assert ours.names() == []
    ours.remove("1.1")
    ours.replace("2", "first")
    theirs.replace("2", "second")
    theirs.replace(".hidden", "")
    assert (ours.read("2").text, ours.names()) == ("second", ["2"])


def test_leases_have_one_holder_and_pass_on_by_generations(place):
    ours, theirs = Leases(place, "here.1.1", 5.0), Leases(place, "elsewhere.1.1", 5.0)
    assert ours.acquire(7)
    assert not ours.acquire(7)
    assert not theirs.acquire(7)
    now = EphemeralFiles(place / LEASES).read("00007.1").time
    assert not theirs.expired(7, 1, now + 4)
    assert theirs.expired(7, 1, now + 6)
    assert theirs.acquire(7, 2)
    assert list_leases(place) == {7: 2}
    ours.release(7)  # woken up again: gives back what it had
    assert list_leases(place) == {7: 2}
    theirs.release(7)
    assert list_leases(place) == {}
    ours.renew()


def test_renewal_never_takes_a_lease_back_that_others_have_taken(url):
    """In a store a renewal is a write: it must not be one over the lease of the next holder."""
    ours, theirs = EphemeralFiles(url / LEASES), EphemeralFiles(url / LEASES)
    assert ours.create("1.1", "ours")
    theirs.remove("1.1")
    assert theirs.create("1.1", "theirs")
    assert not ours.renew("1.1")
    assert theirs.read("1.1").text == "theirs"
    assert theirs.renew("1.1")


def test_lease_whose_answer_was_lost_is_ours(server, url):
    leases = Leases(url, "here.1.1", 5.0)
    server.fail(("lose", "PUT", "/leases/", 1))
    assert leases.acquire(3)
    assert server.met() == [1]
    server.fail(("lose", "PUT", "/leases/", 1))
    leases.renew()
    assert server.met() == [1]
    assert not Leases(url, "elsewhere.1.1", 5.0).acquire(3)


def test_workers_share_the_work_and_none_is_done_twice(cache, rows):
    workers = [start_store_worker(cache, rows, Rank(worker, 2), SlowEngine, lease_s=LONG_S) for worker in range(2)]
    assert [end_of_store_worker(worker) for worker in workers] == [0, 0]
    assert_whole(cache, rows)


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_leases_of_a_killed_worker_are_taken(cache, rows, host):
    """At once if it was a process of this host, else when they have not been renewed for long enough."""
    worker = start_store_worker(cache, rows, Rank(0, 2), HangingEngine, lease_s=LEASE_S, host=host)
    wait_until(lambda: len(list_commits(cache)) >= 9)
    os.kill(worker.pid, signal.SIGKILL)
    assert end_of_store_worker(worker) == -signal.SIGKILL
    assert list_leases(cache)
    run_worker(cache, rows, Rank(1, 2), lease_s=LEASE_S if host else LONG_S)
    assert_whole(cache, rows)


def test_stopped_worker_that_outlives_its_lease_loses_its_race_harmlessly(cache, rows):
    stopped = start_store_worker(cache, rows, Rank(0, 2), SlowEngine, lease_s=LEASE_S, host="elsewhere")
    wait_until(lambda: len(list_commits(cache)) >= 1)
    os.kill(stopped.pid, signal.SIGSTOP)
    run_worker(cache, rows, Rank(1, 2), lease_s=LEASE_S)
    os.kill(stopped.pid, signal.SIGCONT)
    assert end_of_store_worker(stopped) == 0
    assert_whole(cache, rows)


def test_signal_drains_and_gives_the_leases_back(cache, rows):
    rank = Rank(1, 2)
    worker = start_store_worker(cache, rows, rank, SlowEngine, lease_s=LONG_S)
    wait_until(lambda: len(list_commits(cache)) >= 2)
    os.kill(worker.pid, signal.SIGTERM)
    assert end_of_store_worker(worker) == 75
    assert list_leases(cache) == {}
    assert list_commits(cache) < set(rank.share(COUNT))
    run_worker(cache, rows, lease_s=LONG_S)
    assert_whole(cache, rows)


def test_partition_that_fails_again_and_again_is_set_aside_and_the_rest_goes_on(cache, rows):
    with pytest.raises(PartitionsFailedError, match=r"1 partitions were set aside.*13 by ValueError: the thirteenth"):
        run_worker(cache, rows, make_engine=AllergicEngine, lease_s=LONG_S)
    assert list_commits(cache) == set(range(COUNT)) - {13}
    assert read_failure(cache, 13, list_failures(cache)[13]).alone
    with pytest.raises(PartitionsFailedError):
        run_worker(cache, rows, lease_s=LONG_S)  # does not touch it
    forget_failures(cache)
    run_worker(cache, rows, lease_s=LONG_S)
    assert_whole(cache, rows)


def test_beats_that_the_store_refuses_are_left_out(server, url):
    with Heartbeat(url, ALONE, lease_s=0.4) as heartbeat:
        assert heartbeat.leases.acquire(5)
        server.fail(("deny", "PUT", "/leases/", 10_000), ("deny", "PUT", "/workers/", 10_000))
        wait_until(lambda: min(server.met()) >= 2)
        server.fail()
        renewed = EphemeralFiles(url / LEASES).read("00005.1").time
        wait_until(lambda: EphemeralFiles(url / LEASES).read("00005.1").time > renewed)


def test_capture_goes_on_while_beats_fail(server, cache, rows):
    class Refused(SlowEngine):
        def score(self, requests):
            server.fail(("deny", "PUT", "/workers/", 10_000))
            yield from super().score(requests)

    run_worker(cache, rows, make_engine=Refused, lease_s=LEASE_S)
    assert server.met()[0] > 0
    assert_whole(cache, rows)


def test_commit_that_the_store_does_not_take_reaches_the_caller(server, cache, rows, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0.3")
    server.fail(("500", "PUT", "/commits/00003", 10_000))
    with pytest.raises(StorageError, match=r"commits/00003\.json: cannot write it"):
        run_worker(cache, rows, lease_s=LONG_S)
    assert server.met()[0] > 1
    assert list_failures(cache) == {}  # no partition is to blame
    assert list_leases(cache) == {}
    server.fail()
    run_worker(cache, rows, lease_s=LONG_S)
    assert verify_cache(cache).problems == []


def test_worker_leaves_a_store_that_does_not_answer(server, url, monkeypatch):
    """What it would say at last is advice: it is asked for with less patience, and then the leases expire."""
    monkeypatch.setattr("pipeline.runs.ephemeral.PATIENCE_S", 0.3)
    with Heartbeat(url, ALONE, lease_s=LONG_S) as heartbeat:
        assert heartbeat.leases.acquire(5)
        assert heartbeat.leases.acquire(6)
        server.fail(("500", "PUT", "/workers/", 10_000), ("500", "POST", "/bucket", 10_000))  # a POST deletes
    assert min(server.met()) > 1
    server.fail()
    assert list_leases(url) == {5: 1, 6: 1}


class SlowerEngine(FakeEngine):
    """Two answers a second."""

    def score(self, requests):
        for answer in super().score(requests):
            time.sleep(0.5)
            yield answer


@pytest.mark.slow
def test_chaos(url, tmp_path):
    """Workers of several hosts that are killed and suspended for longer than a lease, two to a rank."""
    count, kills, random = 160, 0, Random(0)
    rows = tiny_corpus(tmp_path / "corpus", count)
    cache = new_cache(url, rows)

    def start(slot):
        host = f"node{slot}"
        return start_store_worker(cache, rows, Rank(slot % 2, 2), SlowerEngine, lease_s=LEASE_S, host=host)

    workers = {slot: start(slot) for slot in range(4)}
    while len(list_commits(cache)) < count // 2:
        time.sleep(random.uniform(0.5, 1.5))
        slot = random.randrange(4)
        if random.random() < 0.25:
            os.kill(workers[slot].pid, signal.SIGSTOP)
            time.sleep(1.5 * LEASE_S)
            os.kill(workers[slot].pid, signal.SIGCONT)
        else:
            os.kill(workers[slot].pid, signal.SIGKILL)
            end_of_store_worker(workers[slot])
            workers[slot] = start(slot)
            kills += 1
    assert kills > 0
    assert [end_of_store_worker(worker) for worker in workers.values()] == [0] * 4
    assert verify_cache(cache).problems == []
    assert [sequence.key for sequence in open_cache(cache)] == [sequence.key for sequence in Corpus(rows).rows()]
    assert list_leases(cache) == {}


def leased_and_held_are_the_same(document) -> bool:
    """Both at the time of one status: a tenth partition may be committed between two."""
    return set(map(int, document["running"])) == set(document["workers"][0]["record"]["held"]) != set()


def test_status_is_that_of_a_folder(cache, rows):
    def status(*options):
        code, out, err = run("status", cache, *options)
        assert err == ""
        return code, json.loads(out) if "--json" in options else out

    code, document = status("--json")
    assert (code, document["state"], document["num_done"], document["workers"]) == (3, "incomplete", 0, [])
    worker = start_store_worker(cache, rows, Rank(0, 2), HangingEngine, lease_s=LEASE_S, host="node7")
    wait_until(lambda: status("--json")[1]["num_done"] >= 9)
    wait_until(lambda: status("--json")[1]["workers"][0]["state"] == "capturing")
    code, document = status("--json")
    assert (code, document["cache"]) == (3, str(cache))
    assert document["num_tokens_done"] == 6 * document["num_done"]
    assert document["bytes"] > 0
    (record,) = document["workers"]
    assert (record["record"]["worker"], record["record"]["host"]) == (0, "node7")
    wait_until(lambda: leased_and_held_are_the_same(status("--json")[1]))
    os.kill(worker.pid, signal.SIGKILL)
    end_of_store_worker(worker)
    wait_until(lambda: status("--json")[1]["workers"][0]["state"] == "vanished")
    assert "vanished: worker 0 on node7" in status()[1]
    with pytest.raises(PartitionsFailedError):
        run_worker(cache, rows, make_engine=AllergicEngine, lease_s=LEASE_S)
    code, document = status("--json")
    assert (code, document["failed"]) == (4, {"13": "ValueError: the thirteenth"})
    forget_failures(cache)
    run_worker(cache, rows, lease_s=LEASE_S)
    code, text = status("--watch", "--interval", "3600")
    assert code == 0
    assert "complete: 24 of 24 partitions" in text
    assert [name for name in (cache / WORKERS).names() if name.startswith(".")] == []


def test_status_needs_no_right_to_write(server, cache, rows):
    run_worker(cache, rows, lease_s=LONG_S)
    server.fail(("deny", "PUT", "/", 10_000), ("deny", "POST", "/", 10_000))
    assert run("status", cache)[0] == 0
    assert server.met()[0] >= 1


def test_status_of_no_cache_is_a_mistake(url):
    code, _, err = run("status", url)
    assert code == 2
    assert f"{url}: no cache there" in err
