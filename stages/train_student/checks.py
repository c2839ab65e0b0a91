"""What is checked before a student is loaded."""

from pipeline.config import TrainConfig
from pipeline.errors import CacheMismatchError, ConfigError, PipelineError
from pipeline.files import read_json, write_json
from pipeline.manifest import CacheManifest
from pipeline.settings import resolved
from pipeline.targets import column_of
from stages.train_student.ranks import rank
from stages.train_student.row_targets import DRAWN_TAILS
from stages.train_student.sampler import StepShape

RUN = "run.json"
FREE_TO_CHANGE = (
    *("out", "log_steps", "save_steps", "keep_checkpoints", "batch_size", "gradient_accumulation"),
    *("loader_workers", "tensorboard", "on_bad_loss"),
)
"""Settings that a resumed run may change: with the same global batch they do not change what is trained."""


def require_targets(config: TrainConfig, manifest: CacheManifest) -> None:
    """Refuse a temperature or a tail that the cache does not hold."""
    column_of(manifest.temperatures, config.temperature)
    if manifest.top_k == 0 and config.tail != "sampled":
        raise ConfigError(f"{config.cache}: holds draws alone (top_k is 0); take --tail sampled, not {config.tail!r}.")
    if manifest.top_k > 0 and config.tail == "sampled":
        raise ConfigError(
            f"{config.cache}: holds the top {manifest.top_k} and draws from the rest alone; take --tail hybrid, or cache "
            "again with --top-k 0 for 'sampled'."
        )
    if config.tail in DRAWN_TAILS and config.temperature != manifest.draw_temperature:
        drawn = "no draws" if manifest.draw_temperature is None else f"draws at T={manifest.draw_temperature:g} alone"
        raise ConfigError(
            f"{config.cache}: tail {config.tail!r} at T={config.temperature:g} needs draws from the teacher; it has "
            f"{drawn}; cache again with --tail-samples and --draw-temperature {config.temperature:g}."
        )


def require_same_targets(config: TrainConfig, train: CacheManifest, held_out: CacheManifest) -> None:
    """Refuse a held-out cache that the student cannot be measured on."""
    difference = held_out.tokenizer.difference(train.tokenizer)
    if difference:
        raise CacheMismatchError(f"{config.eval_cache}: its tokenizer is not that of {config.cache}: {difference}.")
    column_of(held_out.temperatures, config.temperature)
    if held_out.top_k == 0:
        raise ConfigError(f"{config.eval_cache}: holds draws alone (top_k is 0); an evaluation needs a top k.")


def open_folder(config: TrainConfig, manifest: CacheManifest, shape: StepShape) -> None:
    """Record what is trained in the output folder, or check that it is the run that is there.

    How a step's sequences are shared among ranks and micro-batches may change, their number may not: the position in
    the data is the number of steps times the global batch.
    """
    run = {key: value for key, value in resolved(config).items() if key not in FREE_TO_CHANGE}
    run |= {"global_batch": shape.global_batch, "cache_corpus": manifest.corpus}
    if rank() != 0:
        return  # rank 0 looks for all
    path = config.out / RUN
    if not path.is_file():
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise ConfigError(f"{config.out}: exists and holds no training run; choose another --out or empty it.")
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
    known = read_json(path, PipelineError)
    different = [key for key in run if run[key] != known.get(key)]
    if different:
        found = "; ".join(f"{key} was {known.get(key)!r}, now {run[key]!r}" for key in different)
        hint = ""
        if "global_batch" in different:
            hint = (
                f" (batch_size {shape.batch_size} x gradient_accumulation {shape.accumulation} x {shape.world_size} "
                "ranks); the same global batch continues with any number of ranks"
            )
        raise ConfigError(f"{config.out}: holds a run with other settings: {found}{hint}; choose another --out.")
