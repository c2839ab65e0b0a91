"""Many workers on one cache: every partition once, whoever is killed, stopped, drained or misled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cache.commits import list_commits
from pipeline.cache.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.corpus import PARTITIONS, Corpus
from pipeline.errors import ConfigError, PartitionsFailedError
from pipeline.runs.failures import FAILURES, list_failures, read_failure
from pipeline.runs.leases import LEASES, Leases
from pipeline.runs.rank import Rank, rank_from_environment
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.helpers import wait_until
from tests.support.workers import end_of, new_cache, run_worker, start_worker, tiny_corpus

ROOT = Path(__file__).parent.parent
COUNT = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A corpus of 24 sequences, one a partition."""
    return tiny_corpus(tmp_path_factory.mktemp("rows"), COUNT)


@pytest.fixture
def cache(tmp_path, rows):
    """Its plan."""
    return new_cache(tmp_path / "cache", rows)


def assert_whole(folder: Path, corpus: Path) -> None:
    """Every sequence once and in order, nothing damaged, no lease left."""
    assert verify_cache(folder).problems == []
    assert [sequence.key for sequence in open_cache(folder)] == [sequence.key for sequence in Corpus(corpus).rows()]
    assert os.listdir(folder / LEASES) == []


class HangingEngine(FakeEngine):
    """Answers ten documents and then waits for ever."""

    def score(self, requests):
        for count, answer in enumerate(super().score(requests)):
            while count >= 10:
                time.sleep(0.05)
            yield answer


class SlowEngine(FakeEngine):
    """20 answers a second."""

    def score(self, requests):
        for answer in super().score(requests):
            time.sleep(0.05)
            yield answer


def test_chaos_at_a_small_size():
    """200 kills over 500 partitions and 20 seeds: `python -m benchmarks.chaos`."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--partitions", "80", "--kills", "25", "--seeds", "1"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert '"problems": []' in finished.stdout


def test_workers_share_the_work_and_end_when_all_of_it_is_done(cache, rows):
    workers = [start_worker(cache, rows, Rank(worker, 3), SlowEngine) for worker in range(3)]
    assert [end_of(pid) for pid in workers] == [0, 0, 0]
    assert_whole(cache, rows)
    assert len(os.listdir(cache / "shards")) == COUNT  # nothing was done twice


def test_stopped_worker_that_outlives_its_lease_loses_its_race_harmlessly(cache, rows):
    stopped = start_worker(cache, rows, Rank(0, 2), SlowEngine, host="elsewhere")
    wait_until(lambda: len(list_commits(cache)) >= 1)
    os.kill(stopped, signal.SIGSTOP)
    run_worker(cache, rows, Rank(1, 2))
    os.kill(stopped, signal.SIGCONT)
    assert end_of(stopped) == 0
    assert_whole(cache, rows)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_first_signal_drains(cache, rows, number):
    worker = start_worker(cache, rows, make_engine=SlowEngine)
    wait_until(lambda: len(list_commits(cache)) >= 2)
    os.kill(worker, number)
    assert end_of(worker) == 75
    assert os.listdir(cache / LEASES) == []
    assert not list(cache.rglob("*.partial"))
    assert 2 <= len(list_commits(cache)) < COUNT
    run_worker(cache, rows)
    assert_whole(cache, rows)


def test_second_signal_leaves_at_once(cache, rows):
    worker = start_worker(cache, rows, make_engine=HangingEngine)
    wait_until(lambda: len(list_commits(cache)) >= 2)
    for _ in range(2):  # the second so close behind the first is its echo
        os.kill(worker, signal.SIGTERM)
        time.sleep(0.3)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    time.sleep(2.5)
    os.kill(worker, signal.SIGTERM)
    assert end_of(worker) == 75
    assert os.listdir(cache / LEASES) == []


class ParentEngine(FakeEngine):
    """Starts a process, as vLLM does."""

    child = None

    def __init__(self, manifest):
        super().__init__(manifest)
        type(self).child = subprocess.Popen(["sleep", "60"])


def test_processes_of_the_engine_never_receive_the_signals(cache, rows):
    run_worker(cache, rows, make_engine=ParentEngine)
    child = ParentEngine.child
    status = Path(f"/proc/{child.pid}/status").read_text()
    child.kill()
    child.wait()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        assert blocked >> (number - 1) & 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


class AllergicEngine(FakeEngine):
    """Breaks down at sequence number 13."""

    def score(self, requests):
        for request in requests:
            if request.token_ids[0] == 13:
                raise ValueError("the thirteenth")
            yield from super().score([request])


def test_partition_that_fails_again_and_again_is_set_aside_and_the_rest_goes_on(cache, rows):
    with pytest.raises(PartitionsFailedError, match=r"1 partitions were set aside.*13 by ValueError: the thirteenth"):
        run_worker(cache, rows, make_engine=AllergicEngine)
    assert list_commits(cache) == set(range(COUNT)) - {13}
    last = read_failure(cache, 13, list_failures(cache)[13])
    assert last.alone
    with pytest.raises(PartitionsFailedError):
        run_worker(cache, rows)  # does not touch it
    for name in os.listdir(cache / FAILURES):
        (cache / FAILURES / name).unlink()
    run_worker(cache, rows)
    assert_whole(cache, rows)


class BrokenEngine(FakeEngine):
    """Answers nothing."""

    def score(self, requests):
        for _ in requests:
            raise ValueError("no CUDA device")
        yield


def test_worker_on_a_bad_machine_gives_up_before_it_has_failed_every_partition(cache, rows):
    with pytest.raises(ValueError, match="no CUDA device"):
        run_worker(cache, rows, make_engine=BrokenEngine)
    assert len(list_failures(cache)) < COUNT
    run_worker(cache, rows)
    assert_whole(cache, rows)


def test_partition_with_which_workers_vanish_is_set_aside(cache, rows):
    (cache / LEASES / "00005.10").write_text("elsewhere.1.1")
    os.utime(cache / LEASES / "00005.10", (0, 0))
    with pytest.raises(PartitionsFailedError, match="5 by 10 workers vanished"):
        run_worker(cache, rows)
    assert list_commits(cache) == set(range(COUNT)) - {5}


def test_unreadable_rows_are_set_aside_at_once(tmp_path, rows):
    import shutil

    corpus = shutil.copytree(rows, tmp_path / "corpus")
    cache = new_cache(tmp_path / "cache", corpus)
    damaged = corpus / PARTITIONS / "00001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(PartitionsFailedError, match=r"12 partitions were set aside.*00001\.arrow"):
        run_worker(cache, corpus)
    assert list_commits(cache) == set(range(12))


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_full_disk_and_read_only_folder_stop_every_worker_and_lose_nothing(disk, rows):
    cache = new_cache(disk / "cache", rows)
    workers = [start_worker(cache, rows, Rank(worker, 2)) for worker in range(2)]
    assert [end_of(pid) for pid in workers] == [2, 2]
    assert list_failures(cache) == {}  # no partition is to blame
    assert len(list_commits(cache)) < COUNT
    remount(disk, "size=8m,ro")
    assert end_of(start_worker(cache, rows)) == 2
    remount(disk, "size=8m,rw")
    run_worker(cache, rows)
    assert_whole(cache, rows)


def test_lease_of_a_dead_process_of_this_host_is_free_at_once(tmp_path):
    from pipeline.processes import owner_name

    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / LEASES).mkdir()
    dead = owner_name().rpartition(".")[0] + f".{process.pid}"
    Leases(tmp_path, dead, 100.0).acquire(3)
    ours = Leases(tmp_path, owner_name(), 100.0)
    assert ours.expired(3, 1, time.time())
    assert ours.acquire(4)
    assert not ours.expired(4, 1, time.time())


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "2"}, Rank(3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "7", "PIPELINE_WORKERS": "32"}, Rank(1, 32)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Rank(1, 4)),
        ({"JOB_COMPLETION_INDEX": "2", "PIPELINE_WORKERS": "4", "SLURM_PROCID": "9", "SLURM_NTASKS": "10"}, Rank(2, 4)),
        ({"PIPELINE_WORKER": "0", "PIPELINE_WORKERS": "2", "SLURM_ARRAY_TASK_ID": "5"}, Rank(0, 2)),
    ],
)
def test_rank_comes_from_the_first_launcher_that_has_set_it(environment, rank):
    assert rank_from_environment(environment) == rank


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "none of PIPELINE_WORKER, SLURM_ARRAY_TASK_ID"),
        ({"JOB_COMPLETION_INDEX": "2"}, "PIPELINE_WORKERS is not"),
        ({"PIPELINE_WORKER": "4", "PIPELINE_WORKERS": "4"}, "worker is 4 of 4 workers"),
        ({"PIPELINE_WORKER": "first", "PIPELINE_WORKERS": "4"}, "PIPELINE_WORKER is 'first'"),
    ],
)
def test_rank_that_makes_no_sense_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        rank_from_environment(environment)
