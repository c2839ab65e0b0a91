"""What a launcher launches: commands, numbers and folders, the same for every launcher."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.documents import short
from pipeline.errors import ConfigError
from pipeline.launch.settings import LAUNCHERS, SubmitConfig
from pipeline.progress import Reporter
from pipeline.runs.outline import UNITS
from pipeline.stores.store import Store

PIPELINE, TORCHRUN = ("-P", "-m", "pipeline.cli"), ("-P", "-m", "torch.distributed.run")
"""What follows `python`. -P: a user's own pipeline.py or stages/ in the working directory is not taken for ours."""


@dataclass(frozen=True)
class Job:
    """What is to be launched: any number of workers on one cache, and a training after if the settings name one; or on
    one corpus."""

    submit: SubmitConfig
    cache: Store
    """Where the workers write to; raises ConfigError if no script could name it."""
    devices_per_worker: int
    """GPUs of a worker, unless the submission says otherwise."""

    def __post_init__(self) -> None:
        if not str(self.cache).isprintable():  # it goes into scripts, a line of which must not become two
            raise ConfigError(f"out is {short(str(self.cache))}; a name with control characters cannot be launched.")

    @property
    def stage(self) -> str:
        """What the workers do, in names of scripts and logs."""
        return "prepare" if self.submit.prepare is not None else "capture"

    @property
    def settings(self) -> Path:
        """The file with the workers' settings."""
        path = self.submit.prepare or self.submit.cache_logits
        assert path is not None
        return path

    @property
    def commits(self) -> Store:
        """The folder in which the workers' run has its commits."""
        return self.cache / UNITS if self.stage == "prepare" else self.cache

    @property
    def launcher(self) -> "Launcher":
        return LAUNCHERS[self.submit.launcher]

    @property
    def folder(self) -> Path:
        """Scripts and logs: next to the cache, which holds nothing else, or next to the settings of one in a store."""
        if self.launcher.in_containers:
            parent = Path.cwd()
        else:
            local = self.cache.path
            parent = (self.settings.absolute() if local is None else local).parent
        return parent / f"{self.name}.jobs"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def worker_log(self, worker: int) -> Path:
        """Where a worker's output goes."""
        return self.logs / f"{self.stage}-{worker}.log"

    @property
    def name(self) -> str:
        return self.cache.name

    @property
    def gpus_per_worker(self) -> int:
        given = self.submit.gpus_per_worker
        return self.devices_per_worker if given is None else given

    def worker_command(self, python: str = sys.executable, config: Path | None = None) -> list[str]:
        """One worker; its rank comes from the environment."""
        path = str(config or self.settings.absolute())
        command = "prepare" if self.stage == "prepare" else "cache-logits"
        return [python, *PIPELINE, command, "--config", path, "--worker-from-env"]

    def gate_command(self, python: str) -> list[str]:
        """What looks at all that the workers have written; a corpus is checked as it is read."""
        return [python, *PIPELINE, *(("status",) if self.stage == "prepare" else ("verify",)), str(self.cache)]

    def student_command(self, python: str = sys.executable, config: Path | None = None) -> list[str]:
        """The training on one node, with a process a GPU."""
        if self.submit.student_gpus <= 1:
            return self.student_process(python, config)
        processes = ["--standalone", "--nproc-per-node", str(self.submit.student_gpus)]
        return [python, *TORCHRUN, *processes, "--no-python", *self.student_process(python, config)]

    def student_process(self, python: str = sys.executable, config: Path | None = None) -> list[str]:
        """One process of the training; what follows `torchrun --no-python`."""
        assert self.submit.train_student is not None
        path = str(config or self.submit.train_student.absolute())
        return [python, *PIPELINE, "train-student", "--config", path]

    def prepare_folder(self) -> None:
        """Make the folder of scripts and logs."""
        self.logs.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What stands behind a name that `--on` takes."""

    launch: Callable[[Job, Reporter], None]
    writes_scripts: bool = False
    """Whether it leaves scripts for a person to submit, with or without submitting them itself."""
    in_containers: bool = False
    """Whether the settings' paths are those of containers: on volumes that this machine may not see."""
