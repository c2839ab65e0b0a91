"""Launchers: the pool on this machine for real, what is written for clusters as far as it can be checked here."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import kubernetes_validate
import psutil
import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.launch import local
from pipeline.launch.job import Job
from pipeline.launch.kubernetes import write_manifests
from pipeline.launch.settings import SubmitConfig
from pipeline.launch.slurm import write_scripts
from pipeline.progress import Reporter
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.store import Store
from pipeline.submit import job_of
from tests.support import leftovers
from tests.support.helpers import wait_until
from tests.support.launching import ROOT, run, small_job


def test_local_pool_survives_a_killed_worker(tmp_path):
    job = small_job(tmp_path, sequences=100, layers=6)
    pool = subprocess.Popen(job.command("local", "--workers", 2), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: job.cache.is_dir() and job.num_done() >= 3)
    os.kill(job.worker_pids()[0], signal.SIGKILL)
    _, errors = pool.communicate(timeout=400)
    assert pool.returncode == 0, errors
    assert "exit code -9, starting again" in errors
    job.assert_whole()


@pytest.mark.slow
def test_local_pool_trains_the_student_when_the_cache_is_whole(tmp_path):
    job = small_job(tmp_path, sequences=20)
    run(job.command("local", student=True))
    job.assert_whole()
    assert json.loads((job.student / "metrics.json").read_text())["steps"] == 2


def test_killed_pool_leaves_no_process(tmp_path):
    job = small_job(tmp_path, sequences=400, layers=6)
    pool = subprocess.Popen(job.command("local", "--workers", 1), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: job.cache.is_dir() and job.num_done() >= 1)
    started = psutil.Process(pool.pid).children(recursive=True)
    pool.kill()
    pool.wait()
    assert started
    assert psutil.wait_procs(started, timeout=120)[1] == []
    assert json.loads(next((job.cache / "workers").glob("*.json")).read_text())["state"] in ("drained", "done")
    assert os.listdir(job.cache / "leases") == []


def test_pool_that_fails_itself_leaves_no_worker(tmp_path, monkeypatch):
    job = small_job(tmp_path, sequences=4)
    monkeypatch.setattr(local, "list_commits", commits := Mock(side_effect=[{}, OSError("disk on fire")]))
    config = SubmitConfig(launcher="local", cache_logits=job.folder / "cache-logits.yaml", workers=2)
    with pytest.raises(OSError, match="disk on fire"):
        local.launch(job_of(config), Reporter())
    assert commits.call_count == 2  # one worker had been started
    assert leftovers.children() == []


def submitted(tmp_path, on: str, cache: Store | None = None, **settings: object) -> Job:
    """A job as `pipeline submit` reads it."""
    small = small_job(tmp_path, sequences=4, cache=cache)
    files = {"cache_logits": small.folder / "cache-logits.yaml", "train_student": small.folder / "train-student.yaml"}
    return job_of(SubmitConfig(launcher=on, write_only=True, **files | settings))


STORE = ObjectStore("s3://bucket/runs/cache")


def test_cache_in_an_object_store_keeps_scripts_and_logs_next_to_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_job(tmp_path / "settings", sequences=4, cache=STORE)
    files = {"cache_logits": Path("settings/cache-logits.yaml"), "image": "registry/pipeline:1", "volume": "models"}
    for launcher, parent in (("local", "settings"), ("slurm", "settings"), ("ray", "settings"), ("kubernetes", ".")):
        job = job_of(SubmitConfig(launcher=launcher, **files))
        assert (job.cache, job.folder) == (STORE, (tmp_path / parent / "cache.jobs").resolve())


def test_slurm_asks_the_store_how_the_run_stands(tmp_path):
    job = submitted(tmp_path, "slurm", cache=STORE)
    write_scripts(job)
    gate = (job.folder / "gate.sbatch").read_text()
    assert f"pipeline.cli status {STORE}\n" in gate
    assert f"pipeline.cli verify {STORE} " in gate


def test_kubernetes_takes_the_credentials_of_the_store_from_a_secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = submitted(tmp_path, "kubernetes", cache=STORE, image="pipeline:1", volume="models", secret="store")
    write_manifests(job)
    for name, kind in (("capture", "containers"), ("student", "containers"), ("student", "initContainers")):
        document = yaml.safe_load((job.folder / f"{name}.yaml").read_text())
        kubernetes_validate.validate(document, "1.31", strict=True)
        (container,) = document["spec"]["template"]["spec"][kind]
        assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
        if kind == "initContainers":
            assert container["command"][-2:] == ["verify", str(STORE)]


def test_local_pool_fills_a_cache_in_an_object_store(tmp_path, url):
    job = small_job(tmp_path, sequences=60, layers=6, cache=url)
    pool = subprocess.Popen(job.command("local", "--workers", 2), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: job.num_done() >= 3)
    os.kill(job.worker_pids()[0], signal.SIGKILL)
    _, errors = pool.communicate(timeout=400)
    assert pool.returncode == 0, errors
    assert "exit code -9, starting again" in errors
    job.assert_whole()
    assert sorted(path.name for path in (tmp_path / "cache.jobs" / "logs").iterdir()) == [
        "capture-0.log",
        "capture-1.log",
    ]


def test_kubernetes_accepts_the_manifests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = submitted(tmp_path, "kubernetes", image="registry/pipeline:1", volume="models", workers=32, student_gpus=8)
    write_manifests(job)
    documents = {path.name: yaml.safe_load(path.read_text()) for path in job.folder.glob("*.yaml")}
    assert sorted(documents) == ["capture.yaml", "settings.yaml", "student.yaml"]
    for document in documents.values():
        for version in ("1.31", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)
    spec = documents["capture.yaml"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 32, 32)
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert {"name": "PIPELINE_WORKERS", "value": "32"} in container["env"]
    command = ["cache-logits", "--config", "/settings/cache-logits.yaml", "--worker-from-env"]
    assert container["command"] == ["python", "-P", "-m", "pipeline.cli", *command]
    assert json.loads(documents["settings.yaml"]["data"]["cache-logits.yaml"])["top_k"] == 8
    assert documents["student.yaml"]["spec"]["suspend"] is True
    run(["bash", "-n", str(job.folder / "submit.sh")])
    spec["completions"] = "thirty-two"
    with pytest.raises(kubernetes_validate.ValidationError):  # the validator does look
        kubernetes_validate.validate(documents["capture.yaml"], "1.31", strict=True)


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_scripts_are_shell_and_say_what_was_asked(tmp_path, nodes):
    job = submitted(
        tmp_path,
        "slurm",
        workers=32,
        gpus_per_worker=8,
        student_nodes=nodes,
        student_gpus=8,
        drain_s=300,
        directives=("--partition=gpu", "--time=12:00:00"),
        setup=("module load cuda",),
    )
    write_scripts(job)
    scripts = {path.name: path.read_text() for path in job.folder.iterdir() if path.is_file()}
    assert sorted(scripts) == ["capture.sbatch", "gate.sbatch", "student.sbatch", "submit.sh"]
    for name, text in scripts.items():
        run(["bash", "-n", str(job.folder / name)])
        assert "@" not in text.replace("USR1@300", "").replace('"$@"', ""), name
    for line in ("--array=0-31", "--gres=gpu:8", "--signal=B:USR1@300", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in scripts["capture.sbatch"]
    assert "module load cuda\n" in scripts["capture.sbatch"]
    assert "--gres" not in scripts["gate.sbatch"]
    assert ("--rdzv-endpoint" in scripts["student.sbatch"]) == (nodes == 2)
    assert "--nproc-per-node 8" in scripts["student.sbatch"]
    assert f"--no-python {sys.executable} -P -m pipeline.cli train-student " in scripts["student.sbatch"]
    assert all("-P -m" in line for text in scripts.values() for line in text.splitlines() if " -m " in line)


def test_kubernetes_takes_no_home_which_is_another_in_its_containers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = submitted(tmp_path, "kubernetes", image="registry/pipeline:1", volume="models")
    document = json.loads(job.submit.cache_logits.read_text())
    job.submit.cache_logits.write_text(json.dumps(document | {"corpus": "~/corpus"}))
    with pytest.raises(ConfigError, match="corpus is ~/corpus; give the absolute path"):
        write_manifests(job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launcher": "kubernetes"}, "give --image and --volume"),
        ({"launcher": "ray", "student_nodes": 2}, "only Slurm trains on several nodes"),
        ({"launcher": "local", "write_only": True}, "nothing is written for 'local'"),
        ({"launcher": "pbs"}, "choose one of: local, slurm, ray, kubernetes"),
    ],
)
def test_submissions_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        SubmitConfig(cache_logits=tmp_path / "c.yaml", **settings)


def test_mistake_in_the_settings_is_found_before_anything_starts(tmp_path):
    job = small_job(tmp_path, sequences=4)
    settings = json.loads((tmp_path / "cache-logits.yaml").read_text()) | {"teacher": "nowhere"}
    (tmp_path / "cache-logits.yaml").write_text(json.dumps(settings))
    result = CliRunner().invoke(
        main, ["submit", "--on", "local", "--cache-logits", str(tmp_path / "cache-logits.yaml")]
    )
    assert result.exit_code == 2
    assert "nowhere: no model there" in result.stderr
    assert not job.cache.exists()


@pytest.mark.parametrize(
    "name", ["$(touch pwned)", "a b; touch pwned", "`touch pwned`", "it's", '"quoted"', "100%j", "-x"]
)
def test_names_in_scripts_are_names(tmp_path, monkeypatch, name):
    """A cache's name reaches the shell as one word, Slurm as a folder, and Kubernetes as a label."""
    monkeypatch.chdir(tmp_path)
    job = submitted(tmp_path, "slurm", cache=tmp_path / name)
    write_scripts(job)
    (tmp_path / "bin").mkdir()
    for tool in ("sbatch", "scontrol"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\n" + "echo 7\n" * (tool == "sbatch"))
        (tmp_path / "bin" / tool).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([job.folder / "submit.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"capture 7, gate 7, student 7; pipeline status {tmp_path / name}\n"
    assert not list(tmp_path.rglob("pwned"))
    for script in ("capture", "gate", "student"):
        run(["bash", "-n", str(job.folder / f"{script}.sbatch")])
        text = (job.folder / f"{script}.sbatch").read_text()
        (label,) = [line for line in text.splitlines() if line.startswith("#SBATCH --job-name=")]
        assert re.fullmatch(r"#SBATCH --job-name=[A-Za-z0-9._-]+", label)
        (log,) = [line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH --output=")]
        assert shlex.split(log) == [
            str(job.logs / f"{script}{'-%a' * (script == 'capture')}.log").replace("100%j", "100%%j")
        ]
    write_manifests(submitted(tmp_path / "more", "kubernetes", cache=tmp_path / name, image="i", volume="v"))
    (manifest,) = tmp_path.glob("*.jobs/capture.yaml")
    kubernetes_validate.validate(yaml.safe_load(manifest.read_text()), "1.31", strict=True)


def test_name_that_would_make_two_lines_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a name with control characters cannot be launched"):
        submitted(tmp_path, "slurm", cache=tmp_path / "a\n#SBATCH --wrap=x")
