"""`pipeline submit --on slurm` on a real Slurm, with a real engine: preempted, timed out, requeued, killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess

import psutil
import pytest

from pipeline.corpus import PARTITIONS
from tests.support.launching import SmallJob, run, small_job
from tests.support.slurm_cluster import SlurmCluster, why_not

GOING_ON = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SIGNALING"}
"""States of a task that may still come to something."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "Slurm is there")]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """One cluster for all tests. They skip themselves where its daemons do not start, as in some containers."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(SlurmCluster(tmp_path_factory.mktemp("slurm")))
        except (AssertionError, OSError, subprocess.SubprocessError) as exc:
            pytest.skip(f"Slurm's daemons do not start here: {exc}")
        yield cluster


def submit(slurm: SlurmCluster, job: SmallJob, *options: object, student: bool = False, **variables: str) -> None:
    """Submit two workers that take a node each; `variables` are of the environment."""
    fixed = ("--workers", 2, "--gpus-per-worker", 8, "--drain-seconds", 55, *options)
    run(job.command("slurm", *fixed, student=student), env=slurm.environment | variables)


def states(slurm: SlurmCluster, what: str) -> list[str]:
    """States of all tasks of a job by what it does."""
    return [state for _, name, state in slurm.jobs() if name == f"cache-{what}"]


def ended(slurm: SlurmCluster, what: str) -> list[str]:
    """States of all tasks once none of them waits or runs; else nothing."""
    slurm.start_requeued()
    found = states(slurm, what)
    return [] if GOING_ON & set(found) else found


def log(job: SmallJob, name: str) -> str:
    return "".join(path.read_text() for path in sorted((job.folder / "cache.jobs" / "logs").glob(name)))


@pytest.fixture
def clean(slurm):
    """No job of an earlier test is left."""
    yield
    with contextlib.suppress(AssertionError):
        slurm.run("scancel", "--user=root")
    slurm.wait_until(lambda: slurm.jobs("PD", "R", "CG") == [])
    slurm.forget()


pytestmark.append(pytest.mark.usefixtures("clean"))


def test_gate_starts_killed_workers_again_and_then_the_student(slurm, tmp_path):
    """A task that is killed fails for good: only the gate can bring it back."""
    job = small_job(tmp_path, sequences=300, layers=6)
    submit(slurm, job, student=True)
    slurm.wait_until(job.cache.is_dir)
    assert_gate_brings_killed_workers_back(slurm, job)


def assert_gate_brings_killed_workers_back(slurm: SlurmCluster, job: SmallJob) -> None:
    """Both workers are killed when they are at work; the cache becomes whole, and the student trains."""
    slurm.wait_until(lambda: len(job.worker_pids()) == 2 and job.num_done() >= 2)
    for pid in job.worker_pids():
        os.kill(pid, signal.SIGKILL)
    slurm.wait_until(lambda: ended(slurm, "student"))
    assert states(slurm, "capture") == ["FAILED", "FAILED", "COMPLETED", "COMPLETED"], log(job, "*")
    assert states(slurm, "gate") == ["COMPLETED", "COMPLETED"]
    assert states(slurm, "student") == ["COMPLETED"]
    job.assert_whole()
    assert json.loads((job.student / "metrics.json").read_text())["steps"] == 2


def test_gate_of_a_cache_in_an_object_store_does_the_same(slurm, server, url, tmp_path):
    job = small_job(tmp_path, sequences=100, layers=6, cache=url)
    submit(slurm, job, student=True, **server.environment(tmp_path / "copies"))
    assert_gate_brings_killed_workers_back(slurm, job)


def test_student_never_starts_when_partitions_were_set_aside(slurm, tmp_path):
    job = small_job(tmp_path, sequences=6)
    submit(slurm, job, "--write-only", student=True)
    damaged = job.corpus / PARTITIONS / "00001.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run(["bash", str(job.folder / "cache.jobs" / "submit.sh")], env=slurm.environment)
    slurm.wait_until(lambda: ended(slurm, "student") and ended(slurm, "gate"))
    assert states(slurm, "student") == ["CANCELLED"]
    assert states(slurm, "gate") == ["FAILED"]
    assert "00001.arrow" in log(job, "gate.log")
    assert job.num_done() == 3


def test_preemption_drains_a_worker_that_comes_back(slurm, tmp_path):
    job = small_job(tmp_path, sequences=400, layers=6)
    submit(slurm, job)
    slurm.wait_until(lambda: job.cache.is_dir() and len(job.worker_pids()) == 2 and job.num_done() >= 2)
    urgent = slurm.run("sbatch", "--parsable", "-p", "high", "--gres=gpu:8", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.wait_until(lambda: [state for job_id, _, state in slurm.jobs() if job_id == urgent] == ["COMPLETED"])
    assert "drained; run the same command again" in log(job, "capture-*.log")
    slurm.wait_until(lambda: ended(slurm, "gate"))
    assert states(slurm, "gate")[-1] == "COMPLETED", log(job, "*")
    job.assert_whole()


def test_time_limit_drains_the_workers_and_the_gate_starts_them_again(slurm, tmp_path):
    """The warning comes 30 s before the end of the second minute, or up to a minute earlier, as Slurm's manual has it:
    by then the workers have started, also on a busy machine, and there is work for several minutes.
    """
    job = small_job(tmp_path, sequences=16_000, layers=6)
    submit(slurm, job, "--sbatch=--time=2", "--drain-seconds", 30)
    slurm.wait_until(lambda: "RUNNING" in states(slurm, "capture")[2:])
    assert "drained; run the same command again" in log(job, "capture-*.log")
    assert "TIMEOUT" not in states(slurm, "capture")
    before = job.num_done()
    assert 0 < before < job.partitions
    slurm.wait_until(lambda: job.num_done() > before)


def test_node_that_dies_and_task_that_is_requeued(slurm, tmp_path):
    job = small_job(tmp_path, sequences=500, layers=6)
    submit(slurm, job)
    slurm.wait_until(lambda: job.cache.is_dir() and len(job.worker_pids()) == 2 and job.num_done() >= 2)
    slurm.kill_node("n2")
    slurm.run("scontrol", "requeue", slurm.run("squeue", "--noheader", "-w", "n1", "-o", "%A"))
    slurm.wait_until(lambda: "down" in {state.rstrip("*") for state in slurm.node_states()})
    slurm.wait_until(lambda: ended(slurm, "gate"))
    slurm.start_node("n2")
    assert states(slurm, "capture") == ["COMPLETED", "COMPLETED"], log(job, "*")
    assert states(slurm, "gate") == ["COMPLETED"]
    job.assert_whole()


def _resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _resolves("n1"), reason="needs `127.0.0.1 n1 n2` in /etc/hosts")
def test_student_on_two_nodes_continues_after_a_rank_was_killed(slurm, tmp_path):
    """Of so many steps that the kill comes before the last of them."""
    job = small_job(tmp_path, sequences=20, max_steps=240)
    submit(slurm, job, "--student-nodes", 2, student=True)
    slurm.wait_until(lambda: list((job.student / "checkpoints").glob("checkpoint-*")))
    os.kill(ranks(slurm)[-1].pid, signal.SIGKILL)
    # Between its end and its requeue the job shows as FAILED for a moment.
    slurm.wait_until(lambda: ended(slurm, "student") == ["COMPLETED"])
    assert "from checkpoint-" in log(job, "student.log")
    assert json.loads((job.student / "run.json").read_text())["global_batch"] == 4  # two sequences on each of two ranks
    assert json.loads((job.student / "metrics.json").read_text())["steps"] == 240


def ranks(slurm: SlurmCluster) -> list[psutil.Process]:
    """Processes that train, of this cluster."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "LOCAL_RANK" in process.environ() and process.environ().get("SLURM_CONF") == slurm.config:
                found.append(process)
    return found
