"""Launchers: each starts the same worker command, on this machine or on a cluster.

What is launched is a `Job`: commands, numbers and folders, the same for every launcher. A launcher
is a function `launch(job, reporter)`. Nothing of what makes a run correct is in here: a launcher may
lose or repeat workers as it likes.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import CacheConfig, SubmitConfig, TrainConfig
from pipeline.documents import short
from pipeline.errors import ConfigError
from pipeline.progress import Reporter
from pipeline.settings import load_config
from pipeline.storage import Location

MODULES = {name: f"pipeline.runs.launch.{name}" for name in ("local", "slurm", "ray", "kubernetes")}
PIPELINE, TORCHRUN = ("-P", "-m", "pipeline.cli"), ("-P", "-m", "torch.distributed.run")
"""What follows `python`. -P: a user's own pipeline.py or stages/ in the working directory is not taken for ours."""


@dataclass(frozen=True)
class Job:
    """What is to be launched."""

    submit: SubmitConfig
    settings: CacheConfig
    """Of the capture, already checked."""

    @classmethod
    def of(cls, submit: SubmitConfig) -> "Job":
        """The job that the files of a submission describe; raises ConfigError before anything is started."""
        settings = load_config(CacheConfig, submit.cache_logits)
        if not str(settings.out).isprintable():  # it goes into scripts, a line of which must not become two
            raise ConfigError(f"out is {short(str(settings.out))}; a name with control characters cannot be launched.")
        if submit.train_student is not None:
            load_config(TrainConfig, submit.train_student)
        return cls(submit, settings)

    @property
    def cache(self) -> Location:
        out = self.settings.out
        return out.absolute() if isinstance(out, Path) else out

    @property
    def folder(self) -> Path:
        """Scripts and logs: next to the cache, which holds nothing but the run, or next to the settings of one in a store."""
        # A cache of Kubernetes lies on a volume that this machine may not see.
        if self.submit.launcher == "kubernetes":
            parent = Path.cwd()
        else:
            parent = self.cache.parent if isinstance(self.cache, Path) else self.submit.cache_logits.absolute().parent
        return parent / f"{self.name}.jobs"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def name(self) -> str:
        return self.cache.name

    @property
    def gpus_per_worker(self) -> int:
        given = self.submit.gpus_per_worker
        return self.settings.tensor_parallel * self.settings.pipeline_parallel if given is None else given

    def capture_command(self, python: str = sys.executable, config: Path | None = None) -> list[str]:
        """One worker; its rank comes from the environment."""
        path = str(config or self.submit.cache_logits.absolute())
        return [python, *PIPELINE, "cache-logits", "--config", path, "--worker-from-env"]

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


def launcher(name: str) -> Callable[[Job, Reporter], None]:
    """The launch function of a kind of cluster."""
    return importlib.import_module(MODULES[name]).launch
