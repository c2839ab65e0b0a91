"""`pipeline status` while workers work, after they died, and its exit codes."""

import json
import os
import signal
import time

import pytest
from click.testing import CliRunner

from pipeline.cache.commits import list_commits
from pipeline.cli import main
from pipeline.errors import PartitionsFailedError
from pipeline.runs.rank import Rank
from pipeline.runs.status import StatusReader, describe
from tests.support.helpers import wait_until
from tests.support.workers import end_of, new_cache, run_worker, start_worker, tiny_corpus
from tests.test_workers import COUNT, AllergicEngine, HangingEngine


@pytest.fixture
def rows(tmp_path):
    return tiny_corpus(tmp_path / "corpus", COUNT)


@pytest.fixture
def cache(tmp_path, rows):
    return new_cache(tmp_path / "cache", rows)


def status(cache):
    """Exit code and the JSON document."""
    result = CliRunner().invoke(main, ["status", str(cache), "--json"])
    return result.exit_code, json.loads(result.stdout)


def agree(document):
    """Leases and the worker's record name the same partitions."""
    return set(map(int, document["running"])) == set(document["workers"][0]["record"]["held"])


def test_run_that_has_not_begun_is_incomplete(cache):
    code, document = status(cache)
    assert (code, document["state"], document["num_done"], document["workers"]) == (3, "incomplete", 0, [])
    assert document["eta_s"] is None


def test_status_of_a_running_and_then_killed_run(cache, rows):
    worker = start_worker(cache, rows, Rank(1, 2), HangingEngine, host="node7")
    try:
        wait_until(lambda: len(list_commits(cache)) >= 9)
        wait_until(lambda: status(cache)[1]["workers"][0]["record"]["num_tokens"] >= 54)
        code, document = status(cache)
        assert code == 3
        assert document["num_done"] == len(list_commits(cache))
        assert document["num_tokens_done"] == 6 * document["num_done"]
        assert document["bytes"] > 0
        assert document["tokens_per_s_so_far"] > 0
        (record,) = document["workers"]
        assert (record["record"]["worker"], record["record"]["host"], record["state"]) == (1, "node7", "capturing")
        wait_until(lambda: agree(status(cache)[1]))
    finally:
        os.kill(worker, signal.SIGKILL)
        end_of(worker)
    # Of another host: only the age of the heartbeat can tell, as the plan's own lease time has it.
    wait_until(lambda: status(cache)[1]["workers"][0]["state"] == "vanished")
    text = CliRunner().invoke(main, ["status", str(cache)]).stdout
    assert "vanished: worker 1 on node7" in text
    run_worker(cache, rows)
    code, document = status(cache)
    assert (code, document["state"], document["num_done"]) == (0, "complete", COUNT)
    assert document["running"] == document["orphaned"] == {}


def test_lease_of_a_dead_process_is_orphaned_at_once(cache, rows):
    worker = start_worker(cache, rows, make_engine=HangingEngine)
    wait_until(lambda: len(list_commits(cache)) >= 9)
    os.kill(worker, signal.SIGKILL)
    end_of(worker)
    code, document = status(cache)
    assert code == 3
    assert document["running"] == {}
    assert document["orphaned"]


def test_partitions_that_were_set_aside_are_named_with_the_reason(cache, rows):
    with pytest.raises(PartitionsFailedError):
        run_worker(cache, rows, make_engine=AllergicEngine)
    code, document = status(cache)
    assert (code, document["state"]) == (4, "failed")
    assert document["failed"] == {"13": "ValueError: the thirteenth"}
    assert "failed: partition 13: ValueError: the thirteenth" in CliRunner().invoke(main, ["status", str(cache)]).stdout


def test_slow_worker_is_named(cache, rows):
    run_worker(cache, rows)
    reader = StatusReader(cache)
    (path,) = (cache / "workers").glob("*.json")
    record = json.loads(path.read_text()) | {"state": "capturing", "beat_s": 3600.0}
    for worker, speed in enumerate((1000, 1100, 300)):
        document = record | {
            "worker": worker,
            "tokens_per_s": speed,
            "owner": f"node{worker}.1.1",
            "host": f"node{worker}",
        }
        (cache / "workers" / f"{worker:04d}-node{worker}.1.1.json").write_text(json.dumps(document))
    path.unlink(missing_ok=True)
    found = reader.read()
    assert [worker.slow for worker in found.workers] == [False, False, True]
    assert found.tokens_per_s_now == 2400
    assert any(line.startswith("slow: worker 2 on node2") for line in describe(found))


def test_watch_ends_when_all_is_done(cache, rows):
    run_worker(cache, rows)
    started = time.monotonic()
    result = CliRunner().invoke(main, ["status", str(cache), "--watch", "--interval", "3600"])
    assert result.exit_code == 0
    assert time.monotonic() - started < 3600


def test_no_cache_is_a_mistake(tmp_path):
    result = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert result.exit_code == 2
    assert "no cache there" in result.stderr
