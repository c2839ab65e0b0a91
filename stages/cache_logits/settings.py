"""The settings of `pipeline cache-logits` and `pipeline audit`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.cpu import available_cores
from pipeline.errors import ConfigError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.grid import WARMEST
from pipeline.settings import COMPUTED_IN, Settings, required, setting
from pipeline.stores.store import Store
from pipeline.targets import TargetSpec
from stages.cache_logits.engines import ENGINES

FLOAT32_BYTES = 4
LOGITS_BYTES = 400 << 20
"""1,024 positions of a vocabulary of 102,400 on one device; 8,192 on each of eight."""
MOST_ENCODING_THREADS = 4
"""Unless one asks for more."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings):
    """How a teacher is run, and what is kept of what it says."""

    teacher: Path = required(
        "Folder of the teacher (config.json, weights, tokenizer), or its name on a model hub, NAME or NAME@REVISION."
    )
    engine: str = setting("vllm", "What runs the teacher.", choices=ENGINES.names)
    top_k: int = setting(64, "Largest probabilities kept for each position; with --top-p at most.")
    top_p: float | None = setting(
        None, "Keep as few of the top k as reach this probability, 0 to 1; none keeps all of them. Not with draws."
    )
    top_p_temperature: float | None = setting(
        None, "Captured temperature T at which --top-p counts; none takes the smallest."
    )
    min_k: int | None = setting(None, "Entries that --top-p keeps of each position at least; none keeps 1.")
    temperatures: tuple[float, ...] = setting(
        (1.0, 2.0), "A temperature T at which targets are exact; repeatable.", flag="--temperature"
    )
    tail_samples: int = setting(0, "Draws from the teacher's tail, outside the top k, kept for each position.")
    tail_rank: int = setting(
        0,
        "Integers of a tail sketch kept for each position, from which the teacher's other logits nearly follow; train "
        "with --tail sketch.",
    )
    draw_temperature: float | None = setting(
        None, "Captured temperature T of the draws; none takes the largest.  Train with --tail hybrid at this T."
    )
    max_kl_error: float = setting(
        1e-4,
        "Largest mean KL(teacher || stored) that rounding may cost in a shard, in nats, at every temperature; "
        "'lossless' keeps every float32. No probability is off by more than 0.001 either way.",
        words={"lossless": 0.0},
    )
    dtype: str = setting(
        "auto", "Type of the teacher's body; its head always runs in float32.", choices=("auto", *COMPUTED_IN)
    )
    tensor_parallel: int = setting(1, "Devices that share each layer of the teacher (vLLM).")
    pipeline_parallel: int = setting(1, "Devices that share the stack of layers (vLLM).")
    batch_tokens: int = setting(8192, "Tokens in one step of the engine.")
    logits_bytes: int = setting(
        LOGITS_BYTES,
        "Bytes of full logits, in float32, that a device has at a time: so many positions are reduced at once.",
    )
    row_chunk: int | None = setting(None, "Positions that are reduced at once, whatever they take.", former=True)
    gpu_memory_utilization: float = setting(0.9, "Share of a GPU's memory that vLLM takes, 0 to 1.")
    quantization: str | None = setting(None, "vLLM's name of the teacher's quantisation, such as fp8.")
    enforce_eager: bool | None = setting(
        None, "Skip vLLM's compilation, which pays on a GPU; none skips it on a CPU, where it takes minutes."
    )
    trust_remote_code: bool = setting(
        False, "Run the code that the teacher's folder brings along; for those whose maker you trust."
    )

    def check(self) -> None:
        self.at_least("top_k", 0)
        self.at_least("tail_samples", 0)
        self.at_least("tail_rank", 0)
        if self.top_k + self.tail_samples == 0:
            raise ConfigError("top_k is 0 and tail_samples is 0; keep at least one entry of a position.")
        if self.tail_rank and not self.top_k:
            raise ConfigError(f"tail_rank is {self.tail_rank} and top_k is 0; a sketch stands beside stored entries.")
        self._check_top_p()
        for name in ("tensor_parallel", "pipeline_parallel", "batch_tokens", "logits_bytes", "row_chunk"):
            self.at_least(name, 1)
        if not self.temperatures:
            raise ConfigError("temperatures is empty; give at least one, such as --temperature 2.0.")
        self.positive("temperatures", self.temperatures)
        if min(self.temperatures) > WARMEST:
            raise ConfigError(f"temperatures is {list(self.temperatures)}; the smallest must be {WARMEST:g} or less.")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ConfigError(f"temperatures is {list(self.temperatures)}; each may be given once.")
        if self.draw_temperature is not None and self.draw_temperature not in self.temperatures:
            raise ConfigError(f"draw_temperature is {self.draw_temperature}; choose one of: {list(self.temperatures)}.")
        if not (self.max_kl_error == 0 or 1e-5 <= self.max_kl_error <= 1):
            raise ConfigError(f"max_kl_error is {self.max_kl_error:g}; it must lie in [1e-05, 1] nats or be lossless.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must lie in (0, 1].")

    def _check_top_p(self) -> None:
        if self.top_p is None:
            for name in ("top_p_temperature", "min_k"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is {getattr(self, name):g}, but top_p is not given; it says how to cut.")
            return
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p:g}; it must lie in (0, 1].")
        if self.tail_samples:
            raise ConfigError(
                f"top_p is {self.top_p:g} and tail_samples {self.tail_samples}: draws come from outside the top k, and "
                "would miss the entries that top_p cuts; leave out one of the two."
            )
        self.at_least("min_k", 1)
        if (self.min_k or 1) > self.top_k:
            raise ConfigError(f"min_k is {self.min_k or 1} and top_k {self.top_k}; top_p keeps between the two.")
        if self.top_p_temperature is not None and self.top_p_temperature not in self.temperatures:
            raise ConfigError(
                f"top_p_temperature is {self.top_p_temperature:g}; choose one of: {list(self.temperatures)}."
            )

    @property
    def spec(self) -> TargetSpec:
        """What is kept of every position."""
        coldest = min(self.temperatures) if self.top_p_temperature is None else self.top_p_temperature
        warmest = max(self.temperatures) if self.draw_temperature is None else self.draw_temperature
        return TargetSpec(
            top_k=self.top_k,
            temperatures=self.temperatures,
            tail_samples=self.tail_samples,
            draw_temperature=warmest if self.tail_samples else None,
            tail_rank=self.tail_rank,
            max_kl_error=self.max_kl_error,
            top_p=self.top_p,
            top_p_temperature=None if self.top_p is None else coldest,
            min_k=None if self.top_p is None else self.min_k or 1,
        )

    def rows_at_once(self, vocab_size: int) -> int:
        """Positions whose logits in float32 exist on a device at the same time, of a vocabulary that ranks share."""
        columns = -(-vocab_size // self.tensor_parallel)
        return self.row_chunk or max(1, self.logits_bytes // (columns * FLOAT32_BYTES))


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TeacherConfig):
    """Settings of `pipeline cache-logits`."""

    corpus: Store = required("Folder or URL that `pipeline prepare` wrote to.")
    out: Store = required("Folder or URL to write the cache to.")
    format: str = setting("arrow", "Container of the shards.", choices=CONTAINERS.names)
    shard_tokens: int = setting(1_048_576, "Tokens in one shard: the work that a crash can lose.")
    sketch_tokens: int = setting(8192, "Positions of the corpus to which a tail sketch is fitted, before the capture.")
    max_sketch_error: float = setting(
        0.01, "Bound on what rounding a sketch's integers adds to the KL of its tails, nats, at every temperature."
    )
    reuse: tuple[Store, ...] = setting(
        (),
        "A cache by the same teacher and settings, finished or not: sequences that it holds are copied instead of "
        "scored; repeatable.",
    )
    encoding_threads: int | None = setting(
        None,
        "Threads that round and compress targets beside the engine; none takes a quarter of the cores, "
        f"{MOST_ENCODING_THREADS} at most. The shards are the same.",
    )
    worker: int = setting(0, "Number of this worker, from 0; any number of workers may share one --out.")
    workers: int = setting(1, "Workers that share the cache: each begins with its share and then takes what is left.")
    worker_from_env: bool = setting(
        False, "Take both from PIPELINE_WORKER, a Slurm array, a Kubernetes Indexed Job or srun, in this order."
    )
    lease_s: float = setting(
        180.0, "Seconds without a heartbeat after which others take a worker's partitions.", flag="--lease-seconds"
    )
    stall_s: float = setting(
        1800.0,
        "Seconds in which the engine finishes nothing although it has requests, or four times as many in which it does "
        "not get loaded, after which this worker gives up with exit code 70.",
        flag="--stall-seconds",
    )
    max_failures: int = setting(3, "Failures of a partition after which it is set aside and the rest goes on.")
    retry_failed: bool = setting(False, "Try again what was set aside.")

    def check(self) -> None:
        super().check()
        self.at_least("shard_tokens", 1)
        self.at_least("encoding_threads", 1)
        self.at_least("max_failures", 1)
        self.at_least("sketch_tokens", 2 * self.tail_rank + 2)
        self.positive("max_sketch_error", (self.max_sketch_error,))
        self.positive("lease_s", (self.lease_s,))
        self.positive("stall_s", (self.stall_s,))
        if not 0 <= self.worker < self.workers:
            raise ConfigError(f"worker is {self.worker} of {self.workers} workers; count from 0.")

    @property
    def num_encoding_threads(self) -> int:
        """Threads that encode: as many as were asked for, else few beside an engine that needs cores itself."""
        return self.encoding_threads or max(1, min(MOST_ENCODING_THREADS, available_cores() // 4))


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Settings):
    """Settings of `pipeline audit`. What is not given is as it was in the capture."""

    cache: Store = required("Folder or URL of a finished cache.", argument=True)
    teacher: Path = required("Folder or name of the teacher that made it.")
    fraction: float = setting(0.001, "Share of the sequences that are scored again, 0 to 1.")
    sequences: int = setting(8, "Sequences that are scored again at least.")
    seed: int = setting(0, "Seed of the sample.")
    noise: float | None = setting(
        None,
        "How far arithmetic alone may put a probability, beyond what rounding does; none takes 0.0001 for a "
        "teacher in float32, 0.02 in float16, 0.1 in bfloat16 or quantised.",
    )
    engine: str | None = setting(None, "What runs the teacher; none takes the capture's.", choices=ENGINES.names)
    tensor_parallel: int | None = setting(None, "Devices that share each layer; none takes the capture's.")
    pipeline_parallel: int | None = setting(None, "Devices that share the stack of layers; none takes the capture's.")
    batch_tokens: int | None = setting(None, "Tokens in one step of the engine; none takes the capture's.")
    gpu_memory_utilization: float | None = setting(None, "Share of a GPU's memory; none takes the capture's.")
    enforce_eager: bool | None = setting(None, "Skip vLLM's compilation; none takes the capture's.")
    trust_remote_code: bool = setting(
        False, "Run the code that the teacher's folder brings along; for those whose maker you trust."
    )

    def check(self) -> None:
        self.seed_fits()
        for name in ("sequences", "tensor_parallel", "pipeline_parallel", "batch_tokens"):
            self.at_least(name, 1)
        self.at_least("noise", 0)
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}; it must lie in [0, 1].")
