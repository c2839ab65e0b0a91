"""Workers as a Kubernetes Indexed Job, and the training as a second, suspended Job.

settings.yaml, capture.yaml (or prepare.yaml), student.yaml and submit.sh are written into a folder of the working
directory. Paths in the settings are those of the containers, absolute: teacher, corpus and cache lie on the volume. A
cache may lie in an object store instead, whose credentials come from a secret or from the pods' identity.
The settings themselves travel as a ConfigMap.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError, PipelineError
from pipeline.exit_codes import AGAIN, MENDABLE
from pipeline.launch.job import Job, Launcher
from pipeline.launch.scripts import write_script
from pipeline.progress import Reporter
from pipeline.stores.patience import patience_of_environment

SETTINGS = Path("/settings")
STUDENT_SETTINGS = "train-student.yaml"
"""Where the containers find the settings."""

SUBMIT = """#!/bin/bash
# What `pipeline submit --on kubernetes` runs. Jobs of the same names must be gone: kubectl delete -f FILE
set -euo pipefail
cd "$(dirname "$0")"
kubectl apply -f settings.yaml -f @stage.yaml
"""

SUBMIT_STUDENT = """kubectl apply -f student.yaml    # suspended
# Stage two starts when stage one is complete; its first container verifies the cache once more.
kubectl wait --for=condition=complete --timeout=-1s job/@capture
kubectl patch job/@student --type=merge -p '{"spec": {"suspend": false}}'
"""


def launch(job: Job, reporter: Reporter) -> None:
    """Write the manifests and run submit.sh; with a student it returns when the capture is complete."""
    write_manifests(job)
    reporter.log(f"{job.folder}: wrote submit.sh and the manifests that it applies")
    if job.submit.write_only:
        return
    if shutil.which("kubectl") is None:
        raise ConfigError(f"kubectl is not on the PATH; run {job.folder / 'submit.sh'} where it is.")
    finished = subprocess.run([str(job.folder / "submit.sh")], stderr=subprocess.PIPE, text=True)
    if finished.returncode:
        raise PipelineError(f"{job.folder / 'submit.sh'}: {' '.join(finished.stderr.split())}")


def write_manifests(job: Job) -> None:
    """Write submit.sh and what it applies."""
    if (local := job.cache.path) is not None and not local.is_absolute():
        raise ConfigError(f"out is {job.cache}; give the absolute path that it has in the containers.")
    for path in filter(None, (job.settings, job.submit.train_student)):
        for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if str(value).startswith("~"):
                raise ConfigError(f"{path}: {name} is {value}; give the absolute path that it has in the containers.")
    job.prepare_folder()
    documents = {"settings.yaml": settings_manifest(job), f"{job.stage}.yaml": workers_manifest(job)}
    text = SUBMIT
    if job.submit.train_student is not None:
        documents["student.yaml"] = student_manifest(job)
        text += SUBMIT_STUDENT
    for name, document in documents.items():
        (job.folder / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    names = {"capture": _name(job, "capture"), "student": _name(job, "student")}
    write_script(job.folder / "submit.sh", text, stage=job.stage, **names)


def settings_manifest(job: Job) -> dict[str, Any]:
    """The YAML files of the settings, as they are."""
    files = {_worker_settings(job): job.settings, STUDENT_SETTINGS: job.submit.train_student}
    data = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path is not None}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": _name(job, "settings")}, "data": data}


def workers_manifest(job: Job) -> dict[str, Any]:
    """One pod a worker. Evicted and drained pods are replaced and not counted as failures."""
    submit = job.submit
    environment = [{"name": "PIPELINE_WORKERS", "value": str(submit.workers)}, *_patience()]
    container = _container(
        job, "worker", job.worker_command("python", SETTINGS / _worker_settings(job)), job.gpus_per_worker, environment
    )
    return _job(
        _name(job, job.stage),
        _pod(job, [container]),
        completionMode="Indexed",
        completions=submit.workers,
        parallelism=submit.workers,
        backoffLimitPerIndex=submit.attempts,
        maxFailedIndexes=submit.workers,
        podFailurePolicy={
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [AGAIN]}},
                {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [MENDABLE]}},
            ]
        },
    )


def student_manifest(job: Job) -> dict[str, Any]:
    """The training on one node, behind a first container that verifies the cache."""
    verify = _container(job, "gate", job.gate_command("python"), 0, _patience())
    container = _container(
        job, "student", job.student_command("python", SETTINGS / STUDENT_SETTINGS), job.submit.student_gpus, _patience()
    )
    pod = _pod(job, [container]) | {"initContainers": [verify]}
    return _job(_name(job, "student"), pod, suspend=True, backoffLimit=job.submit.attempts)


def _job(name: str, pod: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"app": "logit-cache"}},
        "spec": {**spec, "template": {"metadata": {"labels": {"app": "logit-cache"}}, "spec": pod}},
    }


def _pod(job: Job, containers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.submit.drain_s,
        "containers": containers,
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": job.submit.volume}},
            {"name": "settings", "configMap": {"name": _name(job, "settings")}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # the processes of a tensor-parallel engine meet there
        ],
    }


def _container(job: Job, name: str, command: list[str], gpus: int, environment: list[dict[str, str]]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": job.submit.image,
        "command": command,
        "env": environment,
        "envFrom": [{"secretRef": {"name": job.submit.secret}}] if job.submit.secret else [],
        "volumeMounts": [
            {"name": "data", "mountPath": str(job.submit.mount)},
            {"name": "settings", "mountPath": str(SETTINGS)},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
    return container


def _patience() -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in patience_of_environment().items()]


def _worker_settings(job: Job) -> str:
    return "prepare.yaml" if job.stage == "prepare" else "cache-logits.yaml"


def _name(job: Job, what: str) -> str:
    """A name that Kubernetes accepts: lower-case letters, digits and dashes."""
    return f"{re.sub(r'[^a-z0-9]+', '-', job.name.lower()).strip('-') or 'cache'}-{what}"


LAUNCHER = Launcher(launch=launch, writes_scripts=True, in_containers=True)
