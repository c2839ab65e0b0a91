"""The settings of `pipeline submit`: what every launcher takes, and what each has of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings import Settings, required, setting
from pipeline.tables import Table

LAUNCHERS: Table[Any] = Table(
    {name: f"pipeline.launch.{name}:LAUNCHER" for name in ("local", "slurm", "ray", "kubernetes")}
)
"""Each a `job.Launcher`, by the name that `--on` takes."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings(Settings):
    """What every launcher takes."""

    launcher: str = required(
        "What starts the workers: this machine, or a cluster.", choices=LAUNCHERS.names, flag="--on"
    )
    cache_logits: Path | None = setting(None, "YAML file with the settings of `pipeline cache-logits`.")
    prepare: Path | None = setting(None, "YAML file with the settings of `pipeline prepare`, instead of a capture.")
    train_student: Path | None = setting(None, "YAML file with the settings of `pipeline train-student`, to follow.")
    workers: int = setting(1, "Workers that share the cache or the corpus.")
    gpus_per_worker: int | None = setting(
        None, "GPUs of a worker; none takes tensor_parallel x pipeline_parallel, 0 is for a CPU."
    )
    student_nodes: int = setting(1, "Nodes of the student's training.")
    student_gpus: int = setting(0, "GPUs of the student's training on each node; 0 is for a CPU.")
    attempts: int = setting(5, "Times in a row that something is started again without getting further.")
    drain_s: int = setting(
        600, "Seconds of warning before a worker is stopped: more than a shard takes.", flag="--drain-seconds"
    )

    def check(self) -> None:
        if (self.cache_logits is None) == (self.prepare is None):
            raise ConfigError(
                "--cache-logits is missing; give it, or --prepare: the file of a capture or of a preparation."
            )
        if self.prepare is not None and self.train_student is not None:
            raise ConfigError(
                f"train_student is {self.train_student}, which follows a capture; submit both once the corpus is there."
            )
        for name in ("workers", "student_nodes", "attempts", "drain_s"):
            self.at_least(name, 1)
        for name in ("gpus_per_worker", "student_gpus"):
            self.at_least(name, 0)


@dataclass(frozen=True, kw_only=True)
class SlurmSettings(LaunchSettings):
    """What is Slurm's alone."""

    directives: tuple[str, ...] = setting(
        (), "Slurm: a further #SBATCH option of all jobs, such as --partition=gpu; repeatable.", flag="--sbatch"
    )
    setup: tuple[str, ...] = setting((), "Slurm: a line of shell before the command, such as module load cuda.")

    def check(self) -> None:
        super().check()
        if self.student_nodes > 1 and self.launcher != "slurm":
            raise ConfigError(f"student_nodes is {self.student_nodes}; only Slurm trains on several nodes.")


@dataclass(frozen=True, kw_only=True)
class RaySettings(LaunchSettings):
    """What is Ray's alone."""

    address: str | None = setting(None, "Ray: address of the cluster; none starts one on this machine.")


@dataclass(frozen=True, kw_only=True)
class KubernetesSettings(LaunchSettings):
    """What is Kubernetes' alone."""

    image: str | None = setting(None, "Kubernetes: container image in which this package is installed.")
    volume: str | None = setting(None, "Kubernetes: persistent volume claim with teacher, corpus and cache.")
    secret: str | None = setting(
        None, "Kubernetes: secret whose entries become environment variables, such as an object store's credentials."
    )
    mount: Path = setting(Path("/data"), "Kubernetes: where the volume appears in the containers.")

    def check(self) -> None:
        super().check()
        if self.launcher == "kubernetes" and (self.image is None or self.volume is None):
            raise ConfigError("launcher is 'kubernetes'; give --image and --volume too.")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(KubernetesSettings, RaySettings, SlurmSettings):
    """Settings of `pipeline submit`; the last of the bases comes first in its help."""

    write_only: bool = setting(False, "Write the scripts and submit nothing.")

    def check(self) -> None:
        super().check()
        if self.write_only and not LAUNCHERS[self.launcher].writes_scripts:
            writers = " and ".join(name for name, launcher in LAUNCHERS.items() if launcher.writes_scripts)
            raise ConfigError(f"write_only: nothing is written for {self.launcher!r}; it is for {writers}.")
