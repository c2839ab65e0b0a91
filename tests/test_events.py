"""The log of what workers did: whole lines whatever happens to its writer, and nothing that decides anything."""

import json
import os
import signal

import pytest

from pipeline.cache.commits import list_commits
from pipeline.errors import PartitionsFailedError
from pipeline.processes import owner_name
from pipeline.runs.events import EVENTS, EventLog, read_events
from pipeline.runs.heartbeat import Heartbeat
from pipeline.runs.rank import Rank
from pipeline.runs.status import StatusReader
from pipeline.stores import object_store
from pipeline.stores.numbered import list_names
from tests.support.helpers import run, wait_until
from tests.support.workers import ALONE, LEASE_S, end_of, new_cache, run_worker, start_worker, tiny_corpus
from tests.test_workers import COUNT, AllergicEngine, HangingEngine, SlowEngine, assert_whole

ALL = 10_000


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("rows"), COUNT)


@pytest.fixture(params=["folder", "store"])
def cache(request, tmp_path, rows):
    """A plan, in a folder or in an object store."""
    place = tmp_path / "cache" if request.param == "folder" else request.getfixturevalue("url")
    return new_cache(place, rows)


def of_kind(found, *kinds):
    return [event["partition"] for event in found if event["what"] in kinds]


def test_events_tell_what_became_of_every_partition(cache, rows):
    with pytest.raises(PartitionsFailedError):
        run_worker(cache, rows, Rank(0, 2), AllergicEngine, lease_s=30.0)
    found = read_events(cache, ALL)
    whats = [event["what"] for event in found]
    assert whats[:2] == ["started", "claimed"]
    assert whats.index("loading") < whats.index("capturing") < whats.index("committed")
    assert whats[-1] == "ended"
    assert sorted(of_kind(found, "committed")) == sorted(set(range(COUNT)) - {13})
    assert set(of_kind(found, "claimed")) == set(range(12))
    assert set(of_kind(found, "stolen")) == set(range(12, COUNT))
    assert of_kind(found, "set aside") == [13]
    assert len(of_kind(found, "failed")) >= 2
    assert all(event["seconds"] >= 0 for event in found if event["what"] == "committed")
    assert {event["worker"] for event in found} == {0}


def test_status_shows_the_last_events_and_only_when_asked(cache, rows):
    run_worker(cache, rows, lease_s=30.0)
    assert StatusReader(cache).read().events == []
    _, out, _ = run("status", cache, "--json", "--events", 3)
    assert json.loads(out)["events"] == read_events(cache, 3)
    assert json.loads(out)["events"][-1]["what"] == "ended"
    _, out, _ = run("status", cache, "--events", 3)
    assert f"{cache}: complete" in out.splitlines()[0]
    assert "worker 0 (" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith("): ended: state done")


def test_drain_lost_race_and_takeover_are_noted(tmp_path, rows):
    cache = new_cache(tmp_path / "cache", rows)
    stopped = start_worker(cache, rows, Rank(0, 2), SlowEngine, host="elsewhere")
    wait_until(lambda: len(list_commits(cache)) >= 1)
    os.kill(stopped, signal.SIGSTOP)
    run_worker(cache, rows, Rank(1, 2))
    os.kill(stopped, signal.SIGCONT)
    assert end_of(stopped) == 0
    found = read_events(cache, ALL)
    taken_over = {event["partition"] for event in found if event["what"] == "stolen" and event["generation"] > 1}
    assert set(of_kind(found, "lost")) <= taken_over
    assert taken_over
    assert sorted(of_kind(found, "committed")) == list(range(COUNT))
    again = new_cache(tmp_path / "again", rows)
    drained = start_worker(again, rows, make_engine=SlowEngine)
    wait_until(lambda: len(list_commits(again)) >= 2)
    os.kill(drained, signal.SIGTERM)
    assert end_of(drained) == 75
    found = read_events(again, ALL)
    assert "draining" in [event["what"] for event in found]
    assert (found[-1]["what"], found[-1]["state"]) == ("ended", "drained")


def test_killed_worker_has_noted_what_it_did_in_a_folder(tmp_path, rows):
    cache = new_cache(tmp_path / "cache", rows)
    worker = start_worker(cache, rows, make_engine=HangingEngine)
    wait_until(lambda: len(list_commits(cache)) >= 9)
    os.kill(worker, signal.SIGKILL)
    end_of(worker)
    found = read_events(cache, ALL)
    assert set(of_kind(found, "committed")) <= list_commits(cache)
    assert list_commits(cache) <= set(of_kind(found, "claimed"))
    assert found[-1]["what"] != "ended"


def test_torn_and_foreign_lines_are_skipped_and_the_next_life_begins_a_line(tmp_path):
    (tmp_path / EVENTS).mkdir()
    log = EventLog(tmp_path, 3, "node.1.1")
    log.note("claimed", partition=7)
    log.close()
    (path,) = (tmp_path / EVENTS).iterdir()
    whole = path.read_bytes()
    for kept in range(len(whole)):
        path.write_bytes(whole + whole[:kept])
        log = EventLog(tmp_path, 3, "node.1.1")
        log.note("claimed", partition=8)
        log.close()
        found = of_kind(read_events(tmp_path, ALL), "claimed")
        assert found[0] == 7
        assert found[-1] == 8
        assert len(found) == 2 + (kept == len(whole) - 1)  # less the line end alone, a line is whole
    path.write_bytes(b'[1, 2]\n"text"\n{"time": "now"}\n\xff\xfe\n' + whole)
    assert of_kind(read_events(tmp_path, ALL), "claimed") == [7]


def test_log_that_cannot_be_written_stops_nobody(tmp_path, rows):
    cache = new_cache(tmp_path / "cache", rows)
    in_the_way = cache / EVENTS / f"0000-{owner_name()}.jsonl"
    in_the_way.mkdir(parents=True)
    run_worker(cache, rows)
    in_the_way.rmdir()
    assert_whole(cache, rows)
    assert read_events(cache, ALL) == []


def test_events_go_into_the_store_at_every_beat_and_into_a_new_object_when_one_is_large(url, monkeypatch):
    monkeypatch.setattr(object_store, "LOG_BYTES", 1000)
    with Heartbeat(url, ALONE, lease_s=LEASE_S) as heartbeat:
        for partition in range(100):
            heartbeat.events.note("claimed", partition=partition)
        wait_until(lambda: len(of_kind(read_events(url, ALL), "claimed")) == 100)
        for partition in range(100, 200):
            heartbeat.events.note("claimed", partition=partition)
    assert of_kind(read_events(url, ALL), "claimed") == list(range(200))
    assert len(list_names(url / EVENTS)) >= 2


def test_events_that_the_store_refuses_are_kept_for_the_next_beat(server, url):
    log = EventLog(url, 0, "node.1.1")
    log.note("claimed", partition=1)
    server.fail(("deny", "PUT", "/events/", 1))
    log.flush()
    assert server.met() == [1]
    log.note("claimed", partition=2)
    log.close()
    assert of_kind(read_events(url, ALL), "claimed") == [1, 2]
