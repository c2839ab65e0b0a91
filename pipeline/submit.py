"""The command `pipeline submit`: the settings of the stages become a job, and a launcher starts it."""

from pipeline.launch.job import Job
from pipeline.launch.settings import LAUNCHERS, SubmitConfig
from pipeline.progress import Reporter
from pipeline.settings import load_config
from stages.cache_logits.settings import CacheConfig
from stages.prepare.settings import PrepareConfig
from stages.train_student.settings import TrainConfig


def submit(config: SubmitConfig, reporter: Reporter) -> None:
    """Launch what the files of a submission describe; raises ConfigError before anything is started."""
    job = job_of(config)
    if not job.launcher.in_containers and config.prepare is not None:
        from stages.prepare.run import plan_corpus

        plan_corpus(load_config(PrepareConfig, config.prepare), reporter)
    elif not job.launcher.in_containers:
        from stages.cache_logits.planning import plan_cache

        plan_cache(load_config(CacheConfig, config.cache_logits))
    job.launcher.launch(job, reporter)


def job_of(config: SubmitConfig) -> Job:
    """The job that the files of a submission describe, all of them checked."""
    in_containers = LAUNCHERS[config.launcher].in_containers
    if config.prepare is not None:
        preparation = load_config(PrepareConfig, config.prepare)
        return Job(config, preparation.out if in_containers else preparation.out.absolute(), 0)
    capture = load_config(CacheConfig, config.cache_logits)
    if config.train_student is not None:
        load_config(TrainConfig, config.train_student)
    cache = capture.out if in_containers else capture.out.absolute()
    return Job(config, cache, capture.tensor_parallel * capture.pipeline_parallel)
