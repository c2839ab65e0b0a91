"""Launchers and a store that is silent for longer than anybody's patience: workers come back, gates too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import PipelineError
from pipeline.launch import local
from pipeline.launch.job import Job
from pipeline.launch.kubernetes import write_manifests
from pipeline.launch.settings import SubmitConfig
from pipeline.launch.slurm import write_scripts
from pipeline.progress import KeptLines
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.patience import PATIENCE
from pipeline.submit import job_of
from tests.support.helpers import wait_until
from tests.support.launching import ROOT, small_job
from tests.support.workers import new_cache, run_worker, tiny_corpus

STORE = ObjectStore("s3://bucket/runs/cache")


def submitted(folder: Path, on: str, cache: ObjectStore = STORE, **settings: object) -> Job:
    """A job as `pipeline submit` reads it."""
    small = small_job(folder, sequences=4, cache=cache)
    files = {"cache_logits": small.folder / "cache-logits.yaml", "train_student": small.folder / "train-student.yaml"}
    return job_of(SubmitConfig(launcher=on, **files | settings))


def commands(monkeypatch, script: str) -> None:
    """What the launcher starts instead of workers."""
    monkeypatch.setattr(Job, "worker_command", lambda job: ["bash", "-c", script])


def test_pool_starts_workers_again_that_gave_up_waiting_also_while_it_cannot_look_itself(
    server, url, tmp_path, monkeypatch
):
    monkeypatch.setenv(PATIENCE, "0.1")
    run_worker(new_cache(url, tiny_corpus(tmp_path / "rows", 2)), tmp_path / "rows", lease_s=100.0)
    job, reporter = submitted(tmp_path, "local", cache=url, train_student=None), KeptLines()
    mend = f"import urllib.request as u; u.urlopen(u.Request('{server.address}/_faults', data=b'[]')).close()"
    third = f"[ $(wc -l < {tmp_path}/starts) -eq 3 ]"
    commands(monkeypatch, f'echo x >> {tmp_path}/starts; {third} || exit 75; {sys.executable} -c "{mend}"')
    server.fail(("outage 1000", "", url.name, 10**9))
    local.launch(job, reporter)
    assert (tmp_path / "starts").read_text().count("x") == 3
    assert [line for line in reporter.lines if "exit code 75, starting again" in line]


def test_pool_gives_up_workers_that_never_get_further(server, url, tmp_path, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0.1")
    new_cache(url, tiny_corpus(tmp_path / "rows", 2))
    job = submitted(tmp_path, "local", cache=url, train_student=None, attempts=2)
    commands(monkeypatch, f"echo x >> {tmp_path}/starts; exit 75")
    with pytest.raises(PipelineError, match="incomplete after all workers have ended"):
        local.launch(job, KeptLines())
    assert (tmp_path / "starts").read_text().count("x") == 2


@pytest.mark.slow
def test_pool_outlives_an_outage(server, url, tmp_path):
    """Of 12 s, with a patience of one: every worker ends with 75 and is started again."""
    job = small_job(tmp_path, sequences=60, layers=6, cache=url)
    environment = {**os.environ, PATIENCE: "1"}
    command = job.command("local", "--workers", 2, "--attempts", 100)
    pool = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: job.num_done() >= 3)
    server.fail(("outage 12", "", url.name, 10**9))
    _, errors = pool.communicate(timeout=400)
    assert pool.returncode == 0, errors
    assert "exit code 75, starting again" in errors
    server.fail()
    job.assert_whole()


def gate(tmp_path, monkeypatch, status: int, verify: int = 0, restarts: int = 0) -> tuple[int, str]:
    """Exit code of the gate's script with commands that only answer so, and the calls of Slurm's commands."""
    calls, tools = tmp_path / "calls", tmp_path / "tools"
    tools.mkdir()
    for name, script in {
        "python": f'[[ "$*" == *status* ]] && exit {status}; exit {verify}',
        "scontrol": f'echo "scontrol $*" >> {calls}; [ $1 != requeue ] || kill $PPID',
        "sbatch": f'echo "sbatch $*" >> {calls}; echo 7',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    calls.touch()
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    job = submitted(tmp_path, "slurm", attempts=3, write_only=True)
    write_scripts(job)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restarts)}
    finished = subprocess.run([job.folder / "gate.sbatch"], env=environment, capture_output=True, text=True)
    return finished.returncode, calls.read_text()


@pytest.mark.parametrize(("status", "verify"), [(75, 0), (0, 75)])
def test_gate_comes_back_while_the_store_is_silent(tmp_path, monkeypatch, status, verify):
    assert gate(tmp_path, monkeypatch, status, verify)[1] == "scontrol requeue 5\n"


@pytest.mark.parametrize(
    ("status", "verify", "code"), [(75, 0, 1), (0, 75, 1), (0, 0, 0), (0, 1, 1), (0, 2, 2), (4, 0, 1)]
)
def test_gate_opens_or_stays_shut(tmp_path, monkeypatch, status, verify, code):
    assert gate(tmp_path, monkeypatch, status, verify, restarts=3) == (code, "")


def test_gate_starts_an_incomplete_capture_again(tmp_path, monkeypatch):
    code, calls = gate(tmp_path, monkeypatch, 3)
    assert code == 0
    assert "capture.sbatch" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(("value", "told"), [("1800", True), (None, False)])
def test_patience_is_told_to_containers(tmp_path, monkeypatch, value, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PATIENCE, raising=False)
    if value:
        monkeypatch.setenv(PATIENCE, value)
    write_manifests(job := submitted(tmp_path, "kubernetes", image="pipeline:1", volume="models"))
    for name, kind in (("capture", "containers"), ("student", "containers"), ("student", "initContainers")):
        (container,) = yaml.safe_load((job.folder / f"{name}.yaml").read_text())["spec"]["template"]["spec"][kind]
        assert ({"name": PATIENCE, "value": "1800"} in container["env"]) == told
