"""Workers as Ray tasks: each task runs the worker command in a process of its own."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError
from pipeline.exit_codes import MENDABLE
from pipeline.launch.job import Job, Launcher
from pipeline.launch.local import require_whole
from pipeline.processes import Child, last_lines
from pipeline.progress import Reporter
from pipeline.stores.patience import patience_of_environment


def launch(job: Job, reporter: Reporter) -> None:
    """Run workers until all is whole, then the training, as tasks that Ray starts again if they end early."""
    try:
        import ray
    except ImportError as exc:
        raise ConfigError(f"Ray is not installed ({exc}); run `pip install ray`, or take --on local.") from exc
    job.prepare_folder()
    ray.init(address=job.submit.address, log_to_driver=False, include_dashboard=False)
    try:
        task = ray.remote(max_retries=job.submit.attempts, retry_exceptions=True)(run_command)
        worker = task.options(num_cpus=1, num_gpus=job.gpus_per_worker)
        reporter.log(f"ray: {job.submit.workers} workers with {job.gpus_per_worker} GPUs each; logs in {job.logs}")
        _wait_for(
            [
                worker.remote(job.worker_command(), _environment(job, index), str(job.worker_log(index)))
                for index in range(job.submit.workers)
            ]
        )
        require_whole(job, reporter)
        if job.submit.train_student is not None:
            trainer = task.options(num_cpus=1, num_gpus=job.submit.student_gpus)
            _wait_for([trainer.remote(job.student_command(), patience_of_environment(), str(job.logs / "student.log"))])
    finally:
        ray.shutdown()


def run_command(command: list[str], environment: Mapping[str, str], log: str) -> None:
    """Run the command and wait for it; an end that another try may mend is a ChildProcessError.

    The command is killed when this task's process is: its GPUs are given to the next task at once. Which
    they are stands in CUDA_VISIBLE_DEVICES, by Ray.
    """
    child = Child(command, environment, Path(log), orphaned=signal.SIGKILL)
    try:
        code = child.wait()
    finally:
        child.kill()
    if code == MENDABLE:
        return  # trying again does not mend it; what is missing shows at the gate
    if code:
        raise ChildProcessError(f"exit code {code}: {last_lines(Path(log))}")


def _environment(job: Job, worker: int) -> dict[str, str]:
    environment = {"PIPELINE_WORKER": str(worker), "PIPELINE_WORKERS": str(job.submit.workers)}
    environment |= patience_of_environment()
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return environment


def _wait_for(tasks: list) -> None:
    import ray

    try:
        ray.get(tasks)
    except (ray.exceptions.RayError, ChildProcessError) as exc:
        raise PipelineError(f"ray: a task failed for good: {' '.join(str(exc).split())[-300:]}") from exc


LAUNCHER = Launcher(launch=launch)
